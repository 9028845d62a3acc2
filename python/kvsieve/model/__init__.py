"""Everything kvsieve knows about `transformers`. Nothing happens at import.

The seam is four public doors, opened when a stream opens and closed when the last one on the model closes:

1. a `Cache` given to any forward (:mod:`.cache`);
2. a registered attention function (:mod:`.attention`), the only place where queries and fresh keys meet;
3. a registered mask function (:mod:`.masks`), without which left padding never reaches the attention function;
4. forward hooks (:mod:`.hooks`), and in place of the configurations that they look attention up in, views (:mod:`.configs`).

What a model does is found by watching it (:mod:`.probe`), which models are served says :mod:`.support`, and every opening is
checked against the stock model's answer (:mod:`.verify`).
"""
