"""Why a layer is not shown, where forward or backward passes themselves are the reason."""

NOT_SEEN = "its forward pass ran without gradients: inside a reentrant checkpoint (give it use_reentrant=False), say"
BEHIND = "its gradient comes through a reentrant checkpoint (give it use_reentrant=False)"
NOT_CALLED = "no operation with its weight was seen: it was not called, or its weight is used in another way"
TWICE = (
    "two backward passes came through one forward pass of the model: call optimizer.backward(loss, retain_graph=True) "
    "for all but the last"
)
