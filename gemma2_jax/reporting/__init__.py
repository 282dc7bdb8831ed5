"""What a run was like, as pictures: a run's folder is read, drawn, and written as one HTML page."""
