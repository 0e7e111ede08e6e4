"""The training loop: state is the weights, the optimizer, their average and a step; the rest follows from the step.

All processes of a run execute the same steps, evaluations and checkpoints, and agree on a request to stop at each step
boundary. BatchNorm normalizes the images of each process by itself, so only batch-independent norms give the same
curve on one process and on several.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from experiments import checkpoint
from experiments.data.images import ImageSet
from experiments.evaluate import evaluate
from experiments.feed import Feed
from experiments.meter import LossMeter, NonFiniteLoss, peak_mib
from experiments.progress import Report
from experiments.randomness import fold, seed_device
from experiments.run import Run
from experiments.run_folder import RunFolder
from experiments.schedule import learning_rate
from experiments.signals import StopRequest, TrainingStopped, agree

SAVE_SECONDS = 5.0  # without checkpoint_every, no two checkpoints are closer
POLL_STEPS = 16  # on several GPUs: agreeing makes the host wait, so not at every step


class Loop:
    """Trains `net` for `run` from the checkpoint in `folder`, if there is one, to the end.

    Args:
        run: what to do.
        accelerator: of this process.
        net: the model on the CPU, initialized alike on all processes.
        train, test: the images on the device.
        folder: where results go; already opened for this run.
        report: what tells the user.
        stop: the signals received.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        net: nn.Module,
        train: ImageSet,
        test: ImageSet,
        folder: RunFolder,
        report: Report,
        stop: StopRequest,
    ):
        self.run, self.accelerator, self.device = run, accelerator, accelerator.device
        self.folder, self.report, self.stop, self.test = folder, report, stop, test
        self.feed = Feed(train, run, accelerator.process_index, accelerator.num_processes)
        self.total = run.steps or run.epochs * self.feed.steps_per_epoch
        self.eval_steps = max(1, round(run.eval_every * self.feed.steps_per_epoch))
        self.step = self.evaluated = self.best_step = 0
        self.best_top1, self.seconds = -1.0, 0.0
        self.net = net.to(
            self.device, memory_format=torch.channels_last if run.channels_last else torch.preserve_format
        )
        self.average = copy.deepcopy(self.net).requires_grad_(False) if run.ema else None
        self.meter = LossMeter(self.device, self.total)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=run.lr, momentum=run.momentum, weight_decay=run.weight_decay, foreach=True
        )
        self._resume()
        compiled = torch.compile(self.net) if run.compile else self.net
        self.model = accelerator.prepare(compiled)
        self.parameters = list(self.net.parameters())
        self._since_save = self._since_eval = self.step
        self._mark = self._eval_mark = self._save_mark = time.perf_counter()

    def finish(self) -> None:
        """Train to the last step. Raises `TrainingStopped` after saving, `NonFiniteLoss` without saving."""
        self.report.start(self.step, self.total)
        self.net.train()
        while True:
            if self.step > self.evaluated and self._evaluation_due():
                self._evaluate()
            if self.step == self.total:
                break
            self._train_step()
            self._save_or_stop()
        self._save()

    def _train_step(self) -> None:
        step, run = self.step, self.run
        seed_device(self.device, fold(run.seed, "step", step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(run, step, self.feed.steps_per_epoch, self.total)
        images, labels = self.feed.batch(step)
        loss = self._backward(images, labels)
        self._apply_gradients()
        if self.average is not None:
            decay = min(run.ema, (1 + step) / (10 + step))  # a function of the step: nothing to restore
            get_ema_multi_avg_fn(decay)(list(self.average.parameters()), self.parameters, step)
        self.step += 1
        if self.meter.add(loss):
            self._flush()

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss, and return the loss; gradients are reduced once."""
        parts = self.run.accumulate
        if parts == 1:
            return self._backward_part(images, labels, 1)
        pairs = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        with self.accelerator.no_sync(self.model):
            losses = [self._backward_part(x, y, parts) for x, y in pairs[:-1]]
        losses.append(self._backward_part(*pairs[-1], parts))
        return torch.stack(losses).sum()

    def _backward_part(self, images: Tensor, labels: Tensor, parts: int) -> Tensor:
        logits = self.model(images).float()  # under autocast, as the accelerator prepared it
        loss = F.cross_entropy(logits, labels, label_smoothing=self.run.label_smoothing) / parts
        self.accelerator.backward(loss)
        return loss.detach()

    def _apply_gradients(self) -> None:
        # The bare optimizer: accelerate's wrapper adds import look-ups to every step, and only its scaler is needed.
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()

    def _save_or_stop(self) -> None:
        """At a step boundary: save if it is time, and leave if any process was asked to."""
        run, several = self.run, self.accelerator.num_processes > 1
        fixed = run.checkpoint_every is not None and self.step % run.checkpoint_every == 0
        if several and not fixed and self.device.type != "cpu" and self.step % POLL_STEPS:
            return
        save, number = agree(self.accelerator, int(fixed or self._time_to_save()), int(self.stop.received))
        if number:
            self._save_and_leave(number)
        elif save:
            self._save()

    def _time_to_save(self) -> bool:
        if self.run.checkpoint_every is not None or not self.accelerator.is_main_process:
            return False
        enough = 2 * (self.step - self._since_save) >= self.feed.steps_per_epoch
        return enough and time.perf_counter() - self._save_mark >= SAVE_SECONDS

    def _evaluation_due(self) -> bool:
        return self.step % self.eval_steps == 0 or self.step == self.total

    def _evaluate(self) -> None:
        self._flush()
        trained = self._tick()
        self._share_buffers()
        evaluated = self._evaluated()
        seed_device(self.device, fold(self.run.seed, "evaluate", self.step))
        measured = evaluate(
            evaluated,
            self.test,
            self.accelerator,
            scaling=self.run.scaling,
            channels_last=self.run.channels_last,
            stopped=lambda: bool(agree(self.accelerator, int(self.stop.received))[0]),
        )
        if measured is None:
            self._save_and_leave(agree(self.accelerator, int(self.stop.received))[0])
        if not measured["test_loss"] < float("inf"):  # NaN too
            raise self._diverged("test loss", measured["test_loss"], self.step)
        self._record(measured, trained)
        self._mark = self._eval_mark = time.perf_counter()

    def _record(self, measured: dict[str, float], trained: float) -> None:
        """Add the row of this evaluation to the log, and keep the weights if they are the best."""
        images = (self.step - self._since_eval) * self.run.batch_size
        row = {
            "step": self.step,
            "epoch": self.step / self.feed.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.meter.mean(),
            **measured,
            "images_per_second": images / trained if images else float("nan"),
            "peak_mib": peak_mib(self.device),
            "seconds": self.seconds,
        }
        better = measured["top1"] > self.best_top1
        if better:
            self.best_top1, self.best_step = measured["top1"], self.step
        self.evaluated = self._since_eval = self.step
        if self.accelerator.is_main_process:
            self.folder.append_log(row)
            if better:
                state = {"step": self.step, "top1": self.best_top1}
                checkpoint.write(self.folder.best, {"model": self._evaluated().state_dict()}, state)
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=self.step)
        self.report.evaluation(row)

    def _evaluated(self) -> nn.Module:
        return self.net if self.average is None else self.average

    def _share_buffers(self) -> None:
        """Before weights are used or kept: the main process's buffers (BatchNorm's) are the run's."""
        if self.accelerator.num_processes > 1:
            for buffer in self.net.buffers():
                buffer.copy_(broadcast(buffer))
        if self.average is not None:
            for own, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
                own.copy_(buffer)

    def _flush(self) -> None:
        """Look at the losses so far: write them down, or stop at the first that is not finite."""
        try:
            rows = self.meter.flush(self.step, lambda losses: self.accelerator.reduce(losses, "mean"))
        except NonFiniteLoss as error:
            raise self._diverged("training loss", error.loss, error.step) from None
        if self.accelerator.is_main_process:
            self.folder.append_losses(rows)
        self.report.advance(self.step)

    def _diverged(self, what: str, loss: float, step: int) -> NonFiniteLoss:
        rate = learning_rate(self.run, min(step, self.total - 1), self.feed.steps_per_epoch, self.total)
        kept = (
            f"the last good checkpoint is {self.folder.last}" if self.folder.last.exists() else "nothing was saved yet"
        )
        epoch = step / self.feed.steps_per_epoch
        return NonFiniteLoss(
            step,
            loss,
            f"the {what} is {loss} at step {step} (epoch {epoch:.2f}, lr {rate:.3g}); {kept}. Try a lower --lr,"
            " --warmup 100, or --mixed-precision no",
        )

    def _tick(self) -> float:
        """Add the time since the last look to the run's; returns the seconds of training since the last evaluation."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        return now - self._eval_mark

    def _save_and_leave(self, number: int) -> None:
        self._save()
        self.report.note(f"stopped at step {self.step} of {self.total} and saved; the same command goes on from there")
        raise TrainingStopped(number)

    def _save(self) -> None:
        """Write the checkpoint `last`; the one before becomes `previous`."""
        self._flush()
        self._share_buffers()
        norms = torch._foreach_norm([parameter.detach() for parameter in self.parameters])
        if not torch.stack(norms).isfinite().all():
            raise self._diverged("last update, judged by the weights,", float("nan"), self.step)
        self._tick()
        if self.accelerator.is_main_process:
            checkpoint.write(self.folder.last, self._tensors(), self._state(), previous=self.folder.previous)
        spent = time.perf_counter() - self._mark
        self._mark += spent
        self._eval_mark += spent  # saving is not training
        self._since_save, self._save_mark = self.step, self._mark

    def _tensors(self) -> checkpoint.Tensors:
        """`model` is what was evaluated; with an average, the weights in training are beside it."""
        optimizer = {
            f"{name}/{key}": value
            for name, parameter in self.net.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        tensors = {"model": self._evaluated().state_dict(), "optimizer": optimizer}
        return tensors if self.average is None else tensors | {"in_training": self.net.state_dict()}

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best_top1": self.best_top1,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "losses": self.meter.state(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def _resume(self) -> None:
        """Go on from the newest readable checkpoint, and drop what was logged after it."""
        folder, tensors, state, problems = self.folder.checkpoint()
        for problem in problems:
            self.report.note(f"{problem}; using the previous checkpoint")
        self.accelerator.wait_for_everyone()  # all have read before anyone writes
        if folder is not None:
            self._load(tensors, state)
            self.report.note(f"going on from step {self.step} of {self.total} ({folder})")
        if self.accelerator.is_main_process:
            self.folder.rewind(self.step, self.evaluated)

    def _load(self, tensors: checkpoint.Tensors, state: dict[str, Any]) -> None:
        self.net.load_state_dict(tensors.get("in_training", tensors["model"]))
        if self.average is not None:
            self.average.load_state_dict(tensors["model"])
        parameters = dict(self.net.named_parameters())
        for name, value in tensors["optimizer"].items():
            path, _, key = name.rpartition("/")
            parameter = parameters[path]
            self.optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value)
        for name in ("step", "evaluated", "best_top1", "best_step", "seconds"):
            setattr(self, name, state[name])
        self.meter = LossMeter(self.device, self.total, state["losses"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
