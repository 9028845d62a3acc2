"""placeholder"""


def weights(model):
    import hashlib

    h = hashlib.sha256()
    for n, t in sorted(model.state_dict().items()):
        h.update(n.encode())
        h.update(t.detach().float().numpy().tobytes())
    return h.hexdigest()


def tokenizer(t):
    return str(hash(t))
