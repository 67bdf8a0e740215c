"""A served build under load: what comes of many requests, long prompts, and clients that leave, dawdle or send nonsense."""
