"""The processes of one run and the platform that they compute on."""
