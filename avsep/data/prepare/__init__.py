"""Stores from videos: published data sets, or folders of one's own."""
