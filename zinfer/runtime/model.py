"""Open a model for planning.  In: a folder and settings.  Out: its spec, where its weights lie, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import fmean

import torch

from zinfer.checkpoint.check import check_weights
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.checkpoint.sentence import sentence_files
from zinfer.chunks.source import Source, checkpoint_source
from zinfer.chunks.store import open_store
from zinfer.config.limits import memory_limits
from zinfer.config.machine import Machine
from zinfer.config.profiles import SIM_DEFAULT, fingerprint, load_machine, saved_machine
from zinfer.config.resolve import Resolved, resolve
from zinfer.config.schema import Settings, parse_settings
from zinfer.errors import BudgetError, CheckpointError, UsageError
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.precision import computable
from zinfer.kernels.products import with_product_sizes
from zinfer.layers.shapes import with_attention_sizes
from zinfer.log import logger
from zinfer.memory.devices import free_bytes, visible_devices
from zinfer.memory.disk_notes import expected
from zinfer.plan.make import Plan, as_read, check_budget, make_plan
from zinfer.plan.optimise import MAX_BATCH, batch_sizes
from zinfer.plan.profile import profile
from zinfer.plan.records import Workload
from zinfer.runtime.look import Look, is_worth_a_look, look_at
from zinfer.spec.encoder import with_sentence_files
from zinfer.spec.read import read_spec
from zinfer.spec.records import ModelSpec
from zinfer.tokenizer import Tokenizer, load_tokenizer

TEXT_BATCH = 64  # texts of an encoder in one pass
_SMALL = Workload(batch=1, prompt_len=16, gen_len=16)  # where nothing has been asked yet


@dataclass(frozen=True)
class Model:
    """A model that can be planned and opened: everything but its weights."""

    folder: Path
    spec: ModelSpec
    source: Source
    tokenizer: Tokenizer | None
    machine: Machine  # as it was measured
    resolved: Resolved
    look: Look | None = None  # at the disk, as it is now

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.  Raises CheckpointError ZI-4601 when the folder has none."""
        if self.tokenizer is None:
            raise CheckpointError(
                "ZI-4601",
                f"{self.folder} has no tokenizer.json, which text needs",
                remedy="pass token ids (--prompt-ids 1,2,3), or put the model's tokenizer.json beside its weights",
            )
        return self.tokenizer

    def check_kind(self, *, labels: bool) -> None:
        """Raises UsageError ZI-1115 where a text is to be labelled and the model generates, or the other way round."""
        if bool(self.spec.labels) is labels:
            return
        does, remedy = (
            ("generates text", 'llm.classify_labels(prompts, [" yes", " no"])')
            if labels
            else ("labels texts", "llm.classify(texts)")
        )
        raise UsageError(
            "ZI-1115", f"{self.folder} is a {self.spec.architecture}, which {does}", remedy=remedy
        )

    def check_prompt(self, ids: Sequence[int], max_tokens: int) -> None:
        """Raises UsageError ZI-1105 to ZI-1107: no token, ids outside the vocabulary, more than the context holds.

        ZI-1133: the model is an encoder, which generates nothing.
        """
        if self.spec.encoder is not None:
            raise UsageError(
                "ZI-1133",
                f"{self.folder} is an encoder ({self.spec.architecture}); it generates nothing",
                remedy=f"zinfer {'classify' if self.spec.encoder.labels else 'embed'} {self.folder} 'a text'",
            )
        if not ids:
            raise UsageError("ZI-1105", "a prompt without tokens was given", remedy="give at least one token")
        bad = [token for token in ids if not 0 <= token < self.spec.vocab_size]
        if bad:
            raise UsageError(
                "ZI-1106",
                f"token id {bad[0]} is outside the vocabulary of {self.spec.vocab_size}",
                remedy=f"use ids from 0 to {self.spec.vocab_size - 1}",
            )
        room = self.spec.max_context - len(ids)
        if max_tokens > room:
            more = f" and {max_tokens} to generate" if max_tokens else ""
            raise UsageError(
                "ZI-1107",
                f"{len(ids)} prompt tokens{more} exceed the model's context of {self.spec.max_context}",
                remedy=f"--max-tokens {room}"
                if room > 0
                else f"give at most {self.spec.max_context - min(max_tokens, 1)} tokens",
            )

    def workload(
        self, lengths: Sequence[tuple[int, int]], *, is_open: bool = False, logit_rows: int | None = None
    ) -> Workload:
        """What requests of these (prompt, generated) lengths ask of a plan.

        `is_open`: more like them will come; `logit_rows`: rows whose logits are wanted together, if they fit.
        """
        num_rows = sum(prompt for prompt, _ in lengths)
        totals = sorted((prompt + generated for prompt, generated in lengths), reverse=True)
        return Workload(
            batch=len(lengths),
            prompt_len=ceil(fmean(prompt for prompt, _ in lengths)),
            gen_len=ceil(fmean(generated for _, generated in lengths)),
            num_requests=None if is_open else len(lengths),
            max_len=totals[0],
            lengths=tuple(totals[:MAX_BATCH]),
            logit_rows=logit_rows,
            logit_share=min((logit_rows or 0) / max(num_rows, 1), 1.0),
        )

    def with_memory(self, memory: Mapping[str, object], held_bytes: int, held_device_bytes: int = 0) -> Model:
        """The same model under other budgets, for keys of `settings.memory`; `held_bytes` of host memory, and of the
        device's, are ours already.  Raises UsageError for what is no budget.
        """
        settings = self.resolved.settings
        tree = settings.model_dump() | {"memory": settings.memory.model_dump() | dict(memory)}
        return replace(
            self, resolved=_resolved(parse_settings(tree), self.machine, held_bytes, held_device_bytes)
        )

    def without_packing(self) -> Model:
        """The same model, whose weights turned out to be none that can be packed."""
        settings = self.resolved.settings
        runtime = settings.runtime.model_copy(update={"pack": "never"})
        resolved = replace(self.resolved, settings=settings.model_copy(update={"runtime": runtime}))
        return replace(self, resolved=resolved)

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the longest text that is taken: the model's limit, or runtime.context where that is less."""
        limit = self.spec.encoder.max_tokens if self.spec.encoder is not None else None
        context = self.resolved.settings.runtime.context
        return min(limit or self.spec.max_context, self.spec.max_context if context == "auto" else context)

    def plan(self, workload: Workload | None = None) -> Plan:
        """Where every chunk will live and how fast that is, for the best batch size where none is set.

        Raises BudgetError when it cannot be done.
        """
        if self.spec.encoder is not None:
            longest = self.max_text_tokens
            workload = Workload(batch=TEXT_BATCH, prompt_len=longest, max_len=longest)
        workload = workload or _SMALL
        batches: list[int] = []
        if (
            self.resolved.settings.runtime.max_batch == "auto"
            and workload.batch > 1
            and not self.spec.encoder
        ):
            batches = batch_sizes(workload.num_requests)
        now = None if self.look is None else self._now
        return make_plan(
            self.spec, self.source, self.resolved, self.machine, workload, batches=batches, now=now
        )

    def _now(self) -> Machine:
        """The machine of this moment.  While the disk is still looked at the kernels are loaded and tried."""
        assert self.look is not None, "there was no need to look"
        if self.resolved.device == "cpu":
            kernels()
        return self.look.machine()

    def check_budget(self) -> None:
        """Raises BudgetError where `plan` would, for one small request; waits for no look at the disk."""
        try:
            if self.spec.encoder is not None:
                self.plan()
            else:
                check_budget(self.spec, self.source, self.resolved, self.machine, _SMALL)
        except BudgetError:
            self.end_look()
            raise

    def end_look(self) -> None:
        """Wait for the look at the disk, if there is one: no thread is left then."""
        if self.look is not None:
            self.look.end()


def open_model(folder: Path, settings: Settings) -> Model:
    """Check the folder, read its config and headers, choose the machine profile.

    Raises CheckpointError for whatever is wrong with the folder, MachineError when the device is not there, ZI-5361
    when it cannot multiply the weights.
    """
    index = CheckpointIndex.open(folder)
    spec = read_spec(index.config, index.generation_config, index.dtypes)
    if spec.encoder is not None:
        spec = with_sentence_files(spec, *sentence_files(index.side_files))
    if not index.has_weights:
        raise CheckpointError(
            "ZI-4021", f"{folder} holds no weights to run", remedy=f"zinfer plan {folder} needs none"
        )
    if index.is_store:
        spec, source = open_store(index, spec)
    else:
        check_weights(index, spec)
        source = checkpoint_source(spec.program, spec.lookups, index)
    machine, is_saved = machine_for(settings, source.files, spec)
    resolved = _resolved(settings, machine)
    spec = computable(spec, resolved.device)
    tokenizer = load_tokenizer(index)
    if _has_sizes(spec, resolved):
        torch.set_num_threads(resolved.threads)  # before anything asks how many there are
    look = None
    if is_saved and resolved.device != "sim":
        machine, look = _as_it_is_now(machine, source.files, spec, resolved)
    spec = _with_sizes(spec, resolved)
    source = as_read(source, spec, device=resolved.device, exact=settings.exact)
    return Model(folder, spec, source, tokenizer, machine, resolved, look)


def _with_sizes(spec: ModelSpec, resolved: Resolved) -> ModelSpec:
    """The spec with what kernels want of rows and keys here, so that a plan need neither guess nor expect the worst.

    They depend on torch's number of threads.
    """
    if not _has_sizes(spec, resolved):
        return spec
    spec = with_attention_sizes(spec)
    return with_product_sizes(spec, "cpu") if resolved.settings.exact else spec


def _has_sizes(spec: ModelSpec, resolved: Resolved) -> bool:
    """Decoders on a processor alone: a GPU is not looked at before its engine opens."""
    return spec.encoder is None and resolved.device in ("cpu", "sim")


def _resolved(
    settings: Settings, machine: Machine, held_bytes: int = 0, held_device_bytes: int = 0
) -> Resolved:
    """What is free of a device now bounds its budget: another process may hold the rest."""
    devices = visible_devices()
    is_cuda, index = settings.device.startswith("cuda"), int(settings.device.partition(":")[2] or 0)
    if is_cuda and devices.error is not None:
        raise devices.error
    if settings.device == "auto" and devices.is_disappointing:
        logger.warning("%s: computing on the processor", devices.error)
    free = None
    if index < devices.count and (is_cuda or (settings.device == "auto" and machine.device is not None)):
        free = min(free_bytes(index) + held_device_bytes, machine.device_bytes)
    limits = memory_limits()
    limits = replace(limits, available=min(limits.available + held_bytes, limits.total))
    return resolve(settings, machine, limits=limits, num_gpus=devices.count, free_device_bytes=free)


def _as_it_is_now(
    machine: Machine, files: Sequence[Path], spec: ModelSpec, resolved: Resolved
) -> tuple[Machine, Look | None]:
    """A saved profile, with a look at what is not as it was saved: the disk where passes will wait for it, unless some
    run has done so lately, and the memory that a host computes in.  Another disk is measured at once.
    """
    from zinfer.memory.measure import for_files
    from zinfer.memory.measure_disk import device_of

    if files and machine.disk_device != device_of(files):
        machine, files = for_files(machine, files), ()
    elif machine.measured and machine.fingerprint == fingerprint():
        disk, is_fresh = expected(machine.disk_read, machine.disk_device)
        machine, files = machine.model_copy(update={"disk_read": disk}), () if is_fresh else files
    pass_bytes = profile(spec).pass_bytes
    if pass_bytes <= resolved.host_bytes + resolved.device_bytes:
        files = ()
    memory_bytes = min(pass_bytes, resolved.host_bytes) if resolved.device == "cpu" else 0
    is_worth_it = bool(files) or is_worth_a_look(machine, memory_bytes)
    return machine, Look(lambda: look_at(machine, files, memory_bytes)) if is_worth_it else None


def machine_for(settings: Settings, files: Sequence[Path], spec: ModelSpec) -> tuple[Machine, bool]:
    """The named profile; for a simulated device the shipped one; else what doctor saved, or a short probe.

    Also whether it is one that was saved.
    """
    if settings.machine is not None:
        return load_machine(settings.machine), True
    if settings.device == "sim":
        return load_machine(SIM_DEFAULT), True
    from zinfer.runtime.probed import probed

    machine = saved_machine()
    if machine is not None and spec.dtype in machine.host.products:
        return machine, True
    logger.warning(
        "no machine profile with %s products is saved: probing for 2 s (zinfer doctor measures and saves one)",
        spec.dtype,
    )
    machine = probed(files, spec, exact=settings.exact)
    if machine.skipped:
        logger.warning("the probe had no time for %s: guessed (zinfer doctor)", "; ".join(machine.skipped))
    return machine, False
