"""Pictures and pages from plain data: nothing here knows a model, a cache or a policy."""
