"""A page in the browser: drop a photo, edit the labels, see which instance matched which."""
