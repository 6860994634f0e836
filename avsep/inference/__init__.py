"""Separating recordings: long audio in chunks, people's files, and a page of what came out."""
