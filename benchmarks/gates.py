"""JEI-DNN with gates trained as a proper simplex, for benchmarks/claims.py: a method for
`compare.py SET --plugins gates --methods jei_dnn_simplex --docs ELSEWHERE`, with this folder on
PYTHONPATH.
"""

from dataclasses import replace

from offramp.methods import METHODS

NAME = "jei_dnn_simplex"
METHODS.register(NAME, replace(METHODS["jei_dnn"].with_settings({"simplex": True}), name=NAME))
