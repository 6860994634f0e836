"""Bundles: folders and files that travel to a device, written, described and verified."""
