"""`kvsieve serve`: conversations of many clients on one model, each remembered between its requests."""
