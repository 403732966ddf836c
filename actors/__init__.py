"""Who does it: the Ray actors. Imports rl/; Ray appears here and in serve/ only."""
