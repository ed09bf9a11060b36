"""AdamW whose gradients and moments DeepSpeed divides among the processes: its ZeRO stages 1 and 2.

Every process keeps all the weights, and their average. What a checkpoint gets is whole, and what it gives is divided
anew, so it does not tell how many processes it was divided among.
"""

import logging
import os

import torch

from finetuning.cli import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # gradients that are exchanged at once; DeepSpeed's own 500 million take 2 GB of each GPU


class ZeroAdamW(torch.optim.Optimizer):
    """torch's AdamW inside a DeepSpeed engine, with the calls of the loop and the state of torch's own.

    module         holds the trained weights; from now on, backward passes go through `backward`
    optimizer      torch's AdamW of them, without a state yet; its groups stay those that hold the learning rates
    stage          1: moments are divided; 2: gradients too
    max_grad_norm  0: no clipping
    """

    def __init__(self, module, optimizer, stage, max_grad_norm):
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.weights = [weight for group in self.param_groups for weight in group["params"]]
        self.device = self.weights[0].device
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # or it looks for one, and says so
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        if self.device.type == "cpu":  # or it compiles an exchange in shared memory, for a minute; gloo's own will do
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.inner = type(optimizer)([dict(group) for group in self.param_groups])
        config = {
            "train_micro_batch_size_per_gpu": 1,  # of no effect: it multiplies what is logged
            "managed_gradient_accumulation": False,  # a step ends where `step` is called
            "gradient_clipping": float(max_grad_norm or 0),
            "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at every forward pass
            "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        }
        deepspeed.init_distributed()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.inner, config=config)
        if getattr(self.engine, "managed_gradient_accumulation", lambda: True)():
            raise UserError(f"DeepSpeed {deepspeed.__version__} is another than that of requirements.txt: install that")
        # Moments of 0 after step 0, as AdamW itself would make them at its first step; DeepSpeed notes where they lie
        for group in self.inner.param_groups:
            (part,) = group["params"]
            step = torch.zeros((), device=part.device if group["fused"] else "cpu")
            self.inner.state[part] = {"step": step} | {name: torch.zeros_like(part) for name in MOMENTS}
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def backward(self, loss):
        """Add the loss's gradient; the processes' are averaged."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def take_gradient_norm(self):
        """Clip and update, which DeepSpeed does in one; the norm of the whole gradient before, a scalar tensor."""
        for group, own in zip(self.inner.param_groups, self.param_groups, strict=True):
            group |= {key: value for key, value in own.items() if key != "params"}
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def step(self, closure=None):
        """Nothing: the weights are updated already."""

    def zero_grad(self, set_to_none=True):
        """Nothing: DeepSpeed keeps no gradient."""

    def state_dict(self):
        """That of torch's AdamW on one process, on the CPU, in full on the main process alone; all have to call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups, first = [], 0
        for group in self.param_groups:
            groups.append(group | {"params": list(range(first, first + len(group["params"])))})
            first += len(group["params"])
        step, state, is_main = (
            next(iter(self.inner.state.values()))["step"].cpu(),
            {},
            torch.distributed.get_rank() == 0,
        )
        for number, weight in enumerate(self.weights if step else ()):
            whole = {name: safe_get_full_optimizer_state(weight, name) for name in MOMENTS}
            state[number] = {"step": step.clone(), **({k: v.cpu() for k, v in whole.items()} if is_main else {})}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state):
        """Take over a whole state, which every process has, and the weights as the module has them now."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.engine.optimizer.refresh_fp32_params()
        steps = [one["step"] for one in state["state"].values()]
        for part in self.inner.state.values():
            part["step"].fill_(max(steps, default=0))
            for name in MOMENTS:
                part[name].zero_()
        for number, moments in state["state"].items():  # without those of weights that never had a gradient
            for name in MOMENTS:
                safe_set_full_optimizer_state(self.weights[number], moments[name], name)
        for group, loaded in zip(self.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in loaded.items() if key != "params"}
