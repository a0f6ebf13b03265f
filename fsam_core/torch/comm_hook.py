"""A reduction of gradients for DistributedDataParallel that rounds once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def reduce_upcast(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's reduction with the sum of half floats taken in float32, and rounded once.

        ddp.register_comm_hook(None, reduce_upcast)

    Without it a bfloat16 model's gradients are summed in bfloat16, with a rounding for every rank. FSDP2 has
    `MixedPrecisionPolicy(reduce_dtype=torch.float32)` for that.

    Args:
        group: the ranks to reduce over, None for all.
        bucket: gradients, as the hook is given them.
    """
    given = bucket.buffer()
    upcast = given.to(torch.promote_types(given.dtype, torch.float32))
    sent = dist.all_reduce(upcast.div_(dist.get_world_size(group)), group=group, async_op=True).get_future()
    return sent.then(lambda done: given if upcast is given else given.copy_(done.value()[0]))


reduce_upcast.__annotations__.clear()  # DistributedDataParallel looks at them and does not know them as strings
