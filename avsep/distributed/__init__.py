"""Several processes that train one separator together."""
