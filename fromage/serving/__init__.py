"""FROMAGe over HTTP. app: the application; routes -> request_handler -> batching -> model_worker answer a request."""
