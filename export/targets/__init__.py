"""What a bundle is compiled to on the device that runs it."""
