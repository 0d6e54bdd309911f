"""From a picture's bytes to the tiles that the vision tower reads."""
