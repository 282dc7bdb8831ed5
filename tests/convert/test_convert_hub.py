"""Models from the Hub: a real download from a server in this process, the cache without it, and what goes wrong."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

TINY = Path(__file__).parents[2] / "assets" / "tiny-gemma2"
COMMIT = "c" * 40
NEEDED = {file.name for file in TINY.iterdir()} - {"README.md"}
UNNEEDED = {"README.md", "pytorch_model.bin", "tiny.gguf", "original/model.safetensors", "original/config.json"}


class Hub:
    """The part of huggingface.co that a download needs, with one model, org/tiny. It records the requests."""

    def __init__(self):
        self.refusal: tuple[int, str] | None = None  # of files: a status and the Hub's code for it
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.files = {name: (TINY / name).read_bytes() for name in NEEDED} | dict.fromkeys(UNNEEDED, b"unneeded")

    @contextmanager
    def serve(self):
        """Answers; yields the environment that leads to it."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = urlsplit(to.path).path
        self.requests.append((to.command, path))
        if "/org/tiny/" in path:
            self.tokens.add(to.headers.get("Authorization"))
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        status, headers, body = 200, {}, b""
        if path == "/api/models/org/tiny/revision/main":
            body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path in (f"/api/models/org/tiny/tree/{COMMIT}", "/api/models/org/tiny/tree/main"):
            tree = [{"type": "file", "path": at, "size": len(b), "oid": "0"} for at, b in self.files.items()]
            body = json.dumps(tree).encode()
        elif name in self.files and self.refusal:
            status, headers = self.refusal[0], {"X-Error-Code": self.refusal[1]}
        elif name in self.files:
            body = self.files[name]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            status, headers = 401, {"X-Error-Code": "RepoNotFound"}  # as the Hub says to those it does not know
        to.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            to.send_header(key, value)
        to.end_headers()
        if to.command == "GET":
            to.wfile.write(body)


CODE = "import sys; from gemma2_jax.convert.files import hub; print(hub.download(sys.argv[1], weights=True))"


def download(home: Path, environment: dict[str, str], name: str = "org/tiny", code: str = CODE) -> subprocess.Popen:
    """A process that downloads, as the Hub's library reads the environment when it is imported."""
    quiet = {"HF_HOME": str(home), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, name],
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_folder(process: subprocess.Popen) -> Path:
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return Path(output.splitlines()[-1])


def wait_for_refusal(process: subprocess.Popen) -> str:
    """Waits for a download to fail; gives the sentence of its error."""
    output, error = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert "\nValueError: " in error, error
    sentence = error.rpartition("\nValueError: ")[2].strip()
    assert "\n" not in sentence
    return sentence


def test_downloaded_once_and_then_read_without_a_network(tmp_path):
    """Two processes at once download with the token, and they download what is needed of the model."""
    hub = Hub()
    with hub.serve() as environment:
        folders = {wait_for_folder(process) for process in [download(tmp_path, environment) for _ in range(2)]}
    [folder] = folders
    assert folder == tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    got = [path.rpartition("/")[2] for command, path in hub.requests if command == "GET" and "/resolve/" in path]
    assert sorted(got) == sorted(NEEDED)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {name: hub.files[name] for name in NEEDED}
    assert hub.tokens == {"Bearer hf_secret"}
    code = "from gemma2_jax.convert import opening; print(opening.open_checkpoint('org/tiny').path)"
    without = download(tmp_path, environment), download(tmp_path, {"HF_HUB_OFFLINE": "1"}, code=code)
    assert {wait_for_folder(process) for process in without} == folders


def test_a_config_is_had_without_the_weights(tmp_path):
    hub = Hub()
    with hub.serve() as environment:
        folder = wait_for_folder(download(tmp_path, environment, code=CODE.replace("weights=True", "weights=False")))
    assert {file.name for file in folder.iterdir()} == {name for name in NEEDED if not name.endswith(".safetensors")}
    assert {file.name for file in folder.iterdir()} < set(NEEDED)


def test_torch_s_files_are_had_where_there_are_no_others(tmp_path):
    """And a model with neither is refused with what it has."""
    hub = Hub()
    del hub.files["model.safetensors"]
    with hub.serve() as environment:
        folder = wait_for_folder(download(tmp_path / "a", environment))
        del hub.files["pytorch_model.bin"]
        refused = wait_for_refusal(download(tmp_path / "b", environment))
    assert (folder / "pytorch_model.bin").read_bytes() == b"unneeded"
    assert refused.startswith("org/tiny has no weights that this program reads (safetensors, or pytorch_model.bin)")
    assert "tiny.gguf" in refused


def test_a_cache_that_was_made_elsewhere(tmp_path):
    """The layout of an older library, or of a copy on a machine without a network."""
    at = tmp_path / "hub" / "models--org--tiny"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (at / folder).mkdir(parents=True)
    (at / "refs" / "main").write_text(COMMIT)
    for name in NEEDED:
        (at / "blobs" / name).write_bytes((TINY / name).read_bytes())
        (at / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{name}")
    assert wait_for_folder(download(tmp_path, {"HF_HUB_OFFLINE": "1"})) == at / "snapshots" / COMMIT
    assert "there is no folder org/other, it is not in the cache at" in wait_for_refusal(
        download(tmp_path, {"HF_HUB_OFFLINE": "1"}, "org/other")
    )


def test_what_the_hub_does_not_give(tmp_path):
    hub = Hub()
    hub.refusal = 403, "GatedRepo"
    with hub.serve() as environment:
        endpoint = environment["HF_ENDPOINT"]
        gated, missing = download(tmp_path, environment), download(tmp_path, environment, "org/other")
        assert wait_for_refusal(gated) == (
            f"org/tiny is gated: accept its license at {endpoint}/org/tiny, and run `hf auth login` or set HF_TOKEN to "
            "a token of the account that did"
        )
        assert wait_for_refusal(missing).startswith(
            f"there is no folder org/other, and {endpoint} has no model of that name for this account; check"
        )
    offline, down = (
        download(tmp_path / "b", environment | {"HF_HUB_OFFLINE": "1"}),
        download(tmp_path / "b", environment),
    )
    nowhere = f"there is no folder org/tiny, it is not in the cache at {tmp_path / 'b' / 'hub'}, and "
    assert wait_for_refusal(offline) == nowhere + "HF_HUB_OFFLINE is set; unset it to download"
    assert wait_for_refusal(down) == (
        nowhere + f"{endpoint} did not give it ([Errno 111] Connection refused); mend that, or copy the model here"
    )
    # The refused download had got as far as the list of files.
    part = wait_for_refusal(download(tmp_path, environment))
    assert "in the cache at" in part and f"{endpoint} did not give it" in part
