"""Who talks to the trained agent: HTTP over Ray Serve, with the episode loop, the tokens and the engine of training."""
