"""Published and small settings, as YAML."""
