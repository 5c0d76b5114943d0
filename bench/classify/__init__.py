"""A classification of real text: which field a function is from, by its documentation."""
