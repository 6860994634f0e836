"""``avsep app``: the page that separates, from a server on this computer, with Python beside the browser."""
