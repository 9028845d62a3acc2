"""One stream at work: :mod:`.engine` is the order of one forward, :mod:`.part` the life cycle that every feature shares."""
