"""Words that appear in results."""

#: What a program gets, chosen by the configuration files.
AUTO = "auto"
#: Kernels of the plain kind by force; the specialised one, where the automatic choice is it.
PLAIN, WS = "plain", "ws"
#: bf16 in: the activation is quantised in the call.
WITH_QUANTISER = "with quantiser"
#: The block mask is built in the call.
WITH_MASK = "with mask"
#: In place of a variant: a peer stands beside every one.
EVERY = "*"
