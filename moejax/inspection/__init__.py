"""Description of a model from its files: arrays by part, routers, experts; never loaded whole."""
