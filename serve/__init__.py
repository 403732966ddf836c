"""Who talks to the trained agent: an HTTP server over Ray Serve, with the episode loop, the tokens and the engine of training."""
