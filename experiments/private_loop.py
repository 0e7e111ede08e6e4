"""The training loop of DP-SGD: Opacus' per-sample gradients, optimizers and accountants around the same loop.

accelerate launches, places and reports, and wraps nothing: prepared by it, an optimizer of Opacus would leave the
processes with different weights and count half of the steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.budget import Budget
from experiments.data.images import ImageSet
from experiments.loop import Loop
from experiments.poisson import PoissonFeed
from experiments.run import Run
from experiments.secret import Secret, make_key, read_key
from knport import privacy
from knport.errors import KNPortError

PHYSICAL = 256  # images at once, where the run does not say


def check_model(net: nn.Module, run: Run) -> None:
    """Prepare the model of `run` for private training, in place.

    Raises `KNPortError` with what stands against it and the flag that helps.
    """
    layers = [(path, layer) for path, layer in net.named_modules() if hasattr(layer, "statistics_hook")]
    drawn = [path for path, layer in layers if getattr(layer, "dropout", 0)]
    if run.privacy.dp_mode == "functorch" and drawn:
        raise KNPortError(
            f"--dp-mode functorch runs each layer a second time, where its dropout would be another ({drawn[0]} and"
            f" {len(drawn) - 1} more have one): set --dropout 0, or use --dp-mode hooks or ghost"
        )
    try:
        problems = privacy.validate(net)
        if problems:
            listed = "".join(f"\n  {problem}" for problem in problems[:3])
            more = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise KNPortError(
                f"{run.model} with --norm {run.norm} cannot be trained privately, because {len(problems)} of its"
                f" modules stand against it: use --norm kernel or --norm group.{listed}{more}"
            )
        privacy.prepare(net)
    except ImportError as error:
        raise KNPortError(f"--epsilon: {error}") from error


class PrivateLoop(Loop):
    """Trains as `Loop` does, with clipped per-sample gradients, noise, and an account of the privacy spent."""

    def _feed(self, train: ImageSet) -> PoissonFeed:
        self.secret = self._secret()
        return PoissonFeed(train, self.run, self.secret, self.accelerator.process_index, self.accelerator.num_processes)

    def _images_at_once(self) -> int:
        return self.run.privacy.physical_batch_size or PHYSICAL

    def _try_first_step(self) -> None:
        """Not before the steps that are accounted for: the hooks would keep what it leaves."""

    def _secret(self) -> Secret:
        if self.run.privacy.privacy_seed is not None:
            self.report.note(
                "--privacy-seed: whoever knows the seed can take the noise away again; for tests, not for private data"
            )
            return Secret.from_seed(self.run.privacy.privacy_seed)
        key = self.folder.key
        started = self.folder.last.exists() or self.folder.previous.exists()
        if self.accelerator.is_main_process and not started and not key.exists():
            make_key(key)
        self.accelerator.wait_for_everyone()
        return read_key(key)

    def _budget(self) -> Budget:
        return Budget(self.run, len(self.feed.images), self.total)

    def _last_step(self) -> int:
        """Where the target is reached, or the end of the schedule."""
        budget = self.state.budget
        for note in budget.notes():
            self.report.note(note)
        budget.planned = budget.affordable()
        if budget.planned < self.total:
            self.report.note(f"will stop at step {budget.planned} of {self.total}: the next would overrun the target")
        return budget.planned

    def _wrap(self, net: nn.Module) -> nn.Module:
        from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
        from opacus.grad_sample.utils import prepare_module
        from opacus.optimizers import get_optimizer_class

        run, world = self.run, self.accelerator.num_processes
        several = world > 1
        wrapped = DifferentiallyPrivateDistributedDataParallel(net) if several else net
        clip = {"max_grad_norm": run.privacy.clip} if run.privacy.dp_mode == "ghost" else {}
        # sums, not means: a mean has no value on the empty batch that Poisson sampling may draw
        model = prepare_module(wrapped, run.privacy.dp_mode, loss_reduction="sum", **clip)
        self.optimizer = get_optimizer_class("flat", several, run.privacy.dp_mode)(
            self.state.optimizer,
            noise_multiplier=self.state.budget.noise_multiplier,
            max_grad_norm=run.privacy.clip,
            expected_batch_size=run.batch_size / world,
            secure_mode=run.privacy.secure_noise,
        )
        self.optimizer.attach_step_hook(self.state.budget.spend)
        return model

    def _seed(self, step: int) -> None:
        # Dropout is drawn by place in the batch, which depends on who else is in it: as secret as the noise.
        self.secret.seed_device(self.device, "dropout", step, self.accelerator.process_index)

    def _update(self, step: int) -> Tensor:
        """One step: gradients in parts that fit into memory, clipped one by one; noise; the account; the weights."""
        from opacus.utils.batch_memory_manager import BatchSplittingSampler

        # Of several processes, Opacus lets the first add the noise, which is drawn by tensor in the model's order.
        self.optimizer.generator = self.secret.generator(self.device, "noise", step)
        size = self.micro_batch.at(step)
        # what makes up Opacus' BatchMemoryManager: it tells the optimizer which part is the last
        parts = BatchSplittingSampler(sampler=[self.feed.rows(step)], max_batch_size=size, optimizer=self.optimizer)
        total = torch.zeros((), device=self.device)
        for rows in parts:
            total += self._backward_sum(*self.feed.images_of(step, rows))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total / (self.run.batch_size / self.accelerator.num_processes)

    def _backward_sum(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.accelerator.autocast():
            logits = self.model(images).float()
        losses = F.cross_entropy(
            logits, labels, label_smoothing=self.run.optimization.label_smoothing, reduction="none"
        )
        loss = losses.sum()
        if self.run.privacy.dp_mode == "ghost":
            from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

            loss = DPTensorFastGradientClipping(self.model, self.optimizer, losses, "sum")
        with warnings.catch_warnings():
            # torch says at every first layer that the images need no gradients; Opacus does not need them either
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            loss.backward()
        return losses.detach().sum()

    def _row_extras(self) -> dict[str, float]:
        return {"epsilon": self.state.budget.epsilon()}

    def record(self) -> dict[str, Any]:
        seeded = self.run.privacy.privacy_seed is not None
        kept = "from --privacy-seed: none against those who know it" if seeded else "drawn, removed at the end"
        return super().record() | {"privacy": self.state.budget.record() | {"key": kept}}

    def close(self) -> None:
        """After the end: nobody needs the key any more, but an attacker."""
        if self.accelerator.is_main_process and self.run.privacy.privacy_seed is None:
            self.folder.key.unlink(missing_ok=True)
