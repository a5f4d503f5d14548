"""Whether somebody is logged in to Weights & Biases."""

import inspect


def logged_in() -> bool:
    """Whether wandb finds a key, in the places where it looks, without the network and without asking."""
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # of older versions
