"""JEI-DNN: jointly learned exiting and inference, ICLR 2024, arXiv 2310.09163.

On a frozen classifier each layer has a linear exit and a gate that reads four numbers on how sure
the exit is; heads and gates are trained by turns, and a row leaves at the first gate that more
likely than not lets it go. Mended of the released code: its weighting of the heads' losses by
the gates cancels out exactly, since the factor that normalises it is not detached, and is not a
number where all masses of a row are 0; gates need no transfer to the CPU.
`as_released` has the unweighted mean that the code amounts to. Mended by the setting `simplex`
alone, and else as there: full depth has no mass; an exit has none once the gates before it add
up to 1; targets open all gates after the cheapest exit, as if no later one did worse. With it
masses add up to 1, full depth included, and gates learn an expected loss instead of targets. The
weights of the heads leave full depth out either way, since its head is frozen.

Not for regression, where a score has no probabilities for gates to read; not for multi-label
tasks, where there is no single softmax over the labels.
"""

from offramp.exits.gated import GatedSpec
from offramp.methods.base import METHODS, Method
from offramp.objectives.gated import Gated

JEI_DNN = Method(
    name="jei_dnn",
    paper="JEI-DNN, arXiv 2310.09163",
    exits=GatedSpec(pooling="cls"),
    objective=Gated,
    policy="gated",
    released={"as_released": True},
    problem_types=("single_label_classification",),
    why_not="Its gates read the probabilities of classes of which one is right.",
)
METHODS.register(JEI_DNN.name, JEI_DNN)
