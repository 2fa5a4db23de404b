"""Making small models that draft for a larger one: its own outputs are their lessons (`pdx distill`).

1. `texts` chooses prompts and pieces of text; `data` lets the target continue them and stores what it thought.
2. `draft` and `head` say what is trained, and its loss; `loop` trains it, with checkpoints.
3. `distill` does all of it, stores the result in int8, and measures the acceptance; `card` writes what it came to.
"""
