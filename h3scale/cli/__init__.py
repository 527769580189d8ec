"""The h3scale command: one file a verb, heavy imports inside the verbs."""
