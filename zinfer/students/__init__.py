"""Ensembles of shallow students.  In: a teacher and texts.  Out: a group whose every prefix is a usable model."""
