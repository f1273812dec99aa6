"""Web page for interactive prediction: drop a photo, edit the labels, view the matches."""
