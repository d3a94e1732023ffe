"""How the bundled `mini` checkpoint was made, end to end: `python -m recipes.mini --help`.

Stages, each in a module of its own, each restartable:
tokenizer -> bag -> base LM -> warm start -> compression -> alignment -> contrast -> package.
"""
