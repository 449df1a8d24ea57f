"""Deliberate errors: does a test fail for each rule of the protocol that is broken on purpose?

Run by hand or by `make mutants`: `python tests/mutants.py [WORD…]` (only those whose name holds a WORD). Each edit is
applied to a copy of the tree, its test is run there, and must FAIL. An edit that no longer applies fails loudly: the
code has moved on, so must the edit. First every named test is run unchanged and must pass, or its failure says nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/unit/test_"
NEEDED = ("mcft", "tests", "pyproject.toml", "README.md")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """name: what is broken; old must occur exactly once in file; test: the node that must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    # ---- arbiters ----
    Mutant(
        "arbiter: a missing key in etcd is a win", "mcft/arbiter/etcd.py",
        'self._end(Standing.UNKNOWN, f"the key {self.key.name} is missing in etcd")',
        'self._end(Standing.WON, "nobody else has it")',
        "arbiter_etcd.py::test_a_missing_key_is_unknown",
    ),
    Mutant(
        "arbiter: etcd creates instead of comparing", "mcft/agent/etcdhttp.py",
        '            {"key": key, "target": "VALUE", "result": "EQUAL", "value": _b64(what.value)},\n'
        '            {"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": str(what.mod_revision)},\n',
        '            {"key": key, "target": "CREATE", "result": "GREATER", "create_revision": "0"},\n',
        "arbitration.py::test_the_three_questions",
    ),
    Mutant(
        "arbiter: etcd's revision may go back", "mcft/arbiter/etcd.py",
        "if reply.revision < self.revision:", "if reply.revision < 0:",
        "arbiter_etcd.py::test_an_etcd_that_went_back_is_unknown",
    ),
    Mutant(
        "arbiter: a claim is sent before it is durable", "mcft/agent/arbitration.py",
        "                body.claim = intent\n                await self.life.save()\n", "                body.claim = intent\n",
        "arbitration.py::test_the_claim_id_is_on_disk_before_it_is_sent",
    ),
    Mutant(
        "arbiter: a claim that may have been sent is withdrawn", "mcft/arbiter/etcd.py",
        "and not self._unanswered and self._out is None:", "and self._out is None:",
        "arbiter_etcd.py::test_the_answer_that_was_lost_was_a_win",
    ),
    Mutant(
        "arbiter: an `off` that says ok is a host that is off", "mcft/arbiter/fence.py",
        "        if self.standing is not Standing.OPEN or isinstance(ask.what, Off):\n            return\n",
        '        if isinstance(ask.what, Off) and reply.state != "unknown":\n            self.standing = Standing.WON\n'
        "        if self.standing is not Standing.OPEN or isinstance(ask.what, Off):\n            return\n",
        "arbiter_fence.py::test_unverified_is_not_fenced",
    ),
    Mutant(
        "arbiter: a status that can't tell is off", "mcft/agent/fenceagent.py",
        '"off" if code == 2 else "unknown"', '"off"', "arbitration.py::test_only_status_says_off",
    ),
    Mutant(
        "arbiter: both hosts shoot at once", "mcft/arbiter/fence.py",
        'delay_ms if intent.side == "standby" else 0.0', "0.0",
        "arbiter_fence.py::test_the_standby_waits_longer",
    ),
    Mutant(
        "arbiter: a fencing outlives the host that began it", "mcft/agent/arbitration.py",
        'if self.kind == "fence" and self.pending and not self.life.qemu_alive():', "if False:",
        "arbitration.py::test_a_fencing_does_not_outlive_the_host_that_began_it",
    ),
    # ---- the kernel's plug ----
    Mutant(
        "an IFB that was set down is trusted", "mcft/plugjudge.py",
        "        if heard.flags & IFF_UP:\n            return None\n        return Verdict(True, f\"{line.ifb} was set down",
        "        if True:\n            return None\n        return Verdict(True, f\"{line.ifb} was set down",
        "plug.py::test_judging",
    ),
    Mutant(
        "a filter that mirrors is copied before the plug", "mcft/plugwire.py",
        "_HARMLESS_ACTIONS = (", '_HARMLESS_ACTIONS = ("mirred", ',
        "plug.py::test_what_would_pass_the_buffer_is_refused",
    ),
    Mutant(
        "a macvtap is held by a plug", "mcft/netbuffer.py",
        "    for nic in nics:\n        if nic.kind in (",
        '    for nic in nics if asked != "plug" else ():\n        if nic.kind in (',
        "plug.py::test_a_nic_without_a_tap_is_never_let_through",
    ),
    Mutant(
        "a step of the plug may make a qdisc", "mcft/plugwire.py",
        "return _tc(NEWQDISC, 0, line.ifb_index, line.handle, ROOT",
        "return _tc(NEWQDISC, CREATE, line.ifb_index, line.handle, ROOT",
        "plug.py::test_a_step_of_the_plug",
    ),
    # ---- which epochs may leave ----
    Mutant(
        "release at the barrier", "mcft/commit.py",
        "            actions.append(SetBarrier(self._epoch))\n",
        "            actions += [SetBarrier(self._epoch), Release(self._epoch)]\n            self._barrier = None\n",
        "commit.py::TestWorld",
    ),
    Mutant(
        "a foreign RESUME taken as an acknowledgement", "mcft/commit.py",
        "if not (was_in_capture and confirmed):", "if not was_in_capture:",
        "commit.py::TestWorld",
    ),
    Mutant(
        "a RESUME alone taken as an acknowledgement", "mcft/commit.py",
        "if not (was_in_capture and confirmed):", "if False:",
        "commit.py::test_resume_without_a_stop_is_foreign",
    ),
    Mutant(
        "paused taken for colo", "mcft/commit.py",
        'if status == "colo":', 'if status in ("colo", "paused"):',
        "commit.py::TestWorld",
    ),
    Mutant(
        "a barrier without its marker's answer is covered", "mcft/commit.py",
        "if barrier is not None and barrier.marker_answered:", "if barrier is not None:",
        "commit.py::test_barrier_without_its_own_marker_is_not_covered",
    ),
    Mutant(
        "engine mc: count + 1 is enough", "mcft/commit.py",
        "return count >= barrier.count_at + 2", "return count >= barrier.count_at + 1",
        "commit_mc.py::TestMcWorld",
    ),
    Mutant(
        "engine mc: a count asked before the barrier answers it", "mcft/commit.py",
        "if barrier.epoch != epoch_asked:\n            return False\n        if barrier.count_at", "if barrier.count_at",
        "commit_mc.py::test_what_was_asked_before_the_barrier_does_not_count",
    ),
    Mutant(
        "engine mc: a counter that fell goes on", "mcft/commit.py",
        "        if count < self._counter:\n", "        if False:\n",
        "commit_mc.py::test_a_counter_that_falls_is_another_streams",
    ),
    Mutant(
        "engine mc: a gate without its agent counts time", "mcft/gate/mcprimary.py",
        "            self._blind_ms = now_ms\n        return now_ms - max(self._ack_ms, self._blind_ms)",
        "            self._blind_ms = now_ms\n        return now_ms - self._ack_ms",
        "gate_mc.py::test_without_its_agent_it_is_blind_and_decides_nothing",
    ),
    Mutant(
        "engine mc: a standby that follows is asked how it is", "mcft/agent/relay.py",
        "life.ledger.newest is not Kind.TAKEN", "False",
        "mc.py::test_a_standby_that_follows_is_never_asked",
    ),
    Mutant(
        "engine mc: a power-off's late event is not waited for", "mcft/gate/qemu.py",
        "and (relayed or unheard) and not self._stopped:", "and False:",
        "gate_mc.py::test_a_power_off_whose_event_comes_late_is_no_death",
    ),
    Mutant(
        "a new gate says of a dead QEMU what it can't know", "mcft/gate/qemu.py",
        '            if self._state.role == "primary":\n', "            if False:\n",
        "gate.py::test_gate_restarted_over_a_dead_qemu_says_what_libvirt_heard",
    ),
    Mutant(
        "engine mc: the copy is resumed before it says paused", "mcft/engines/mcsession.py",
        'if status in ("paused", "running"):', 'if status in ("paused", "running", "inmigrate"):',
        "gate_mc.py::test_take_over_awaits_paused_and_resumes",
    ),
    Mutant(
        "the lease ignored", "mcft/commit.py",
        "if not self.lease_holds(now_ms):", "if False:",
        "commit.py::TestWorld",
    ),
    Mutant(
        "the lease has no margin", "mcft/commit.py",
        "sent_ms + self.loss_ms - self.margin_ms)", "sent_ms + self.loss_ms)",
        "commit.py::test_lease_ends_before_the_standby_may_act",
    ),
    Mutant(
        "the lease runs from the echo's arrival", "mcft/commit.py",
        "sent_ms + self.loss_ms - self.margin_ms)", "now_ms + self.loss_ms - self.margin_ms)",
        "commit.py::TestWorld",
    ),
    Mutant(
        "a claiming standby withdraws no lease", "mcft/commit.py",
        '        self._lease_until_ms = float("-inf")\n\n    def stream_died', "        pass\n\n    def stream_died",
        "commit.py::TestWorld",
    ),
    Mutant(
        "count + 1 is enough", "mcft/commit.py",
        "return count >= barrier.count_at + 2", "return count >= barrier.count_at + 1",
        "commit.py::test_counting_needs_two_more_than_was_read_behind_the_barrier",
    ),
    Mutant(
        "count + 1 is enough (found by the search)", "mcft/commit.py",
        "return count >= barrier.count_at + 2", "return count >= barrier.count_at + 1",
        "commit.py::test_long_runs",
    ),
    Mutant(
        "a second barrier instead of a merge", "mcft/commit.py",
        "        if self._barrier is None:\n            self._epoch += 1",
        "        if True:\n            self._epoch += 1",
        "commit.py::TestWorld",
    ),
    Mutant(
        "a dead stream acknowledges", "mcft/commit.py",
        "        self._in_capture, self._confirmed = False, False\n        if self._dead or not self._holding:",
        "        self._in_capture, self._confirmed = False, False\n        if not self._holding:",
        "commit.py::TestWorld",
    ),
    Mutant(
        "a capture outlives its monitor connection", "mcft/commit.py",
        "        self._in_capture, self._confirmed = False, False\n        if self._barrier is not None and not",
        "        if self._barrier is not None and not",
        "commit.py::test_reconnected_monitor_voids_markers",
    ),
    Mutant(
        "captures of before the hold count", "mcft/commit.py",
        "        if self._dead or not self._holding:\n            return []\n        self._capture += 1",
        "        if self._dead:\n            return []\n        self._capture += 1",
        "commit.py::test_captures_that_began_before_the_hold_do_not_count",
    ),
    Mutant(
        "engine mc: the acknowledgement that lets nothing leave is asked for", "mcft/engines/mcsession.py",
        "if wanted is None or count + 1 < wanted:", "if False:",
        "mcsession.py::test_every_second_checkpoint_releases_and_few_questions_are_asked",
    ),
    Mutant(
        "whether a guest runs is asked before its null nodes are made", "mcft/diskreplica.py",
        """        await _add_nulls(qmp, disks)
        running = await qmp.status() == "running"
        await qmp.execute("stop")  # a paused one too: it may be resumed just now
""",
        """        running = await qmp.status() == "running"
        await _add_nulls(qmp, disks)
        if running:
            await qmp.execute("stop")
""",
        "diskreplica.py::test_a_paused_guest_that_somebody_resumes_as_it_begins_is_stopped",
    ),
    Mutant(
        "a guest that was resumed on a null node is not told of", "mcft/diskreplica.py",
        '        if await qmp.status() == "running":', "        if False:",
        "diskreplica.py::test_a_guest_that_somebody_resumed_on_a_null_node_is_told_of",
    ),
    Mutant(
        "a label that a full disk kept back stays away", "mcft/agent/peerverbs.py",
        "            life.recompute_labels()", "            pass",
        "labels.py::test_a_label_that_a_full_disk_kept_back_is_written_before_it_is_asked_for",
    ),
    Mutant(
        "a guest's shutdown that only libvirt heard counts as a death", "mcft/agent/decisions.py",
        "if self.libvirts_word.shut_down_by_guest():  # its gate", "if False:  # its gate",
        "decisions.py::test_a_guest_that_shut_itself_down_while_its_gate_was_gone_is_not_raised",
    ),
    # ---- the watcher ----
    Mutant(
        "one silent link counted as the peer's loss", "mcft/gate/core.py",
        "            silent_ms=silent_ms,\n", "            silent_ms=self.silence.silent_ms(now_ms, first),\n",
        "gate.py::test_silence_of_one_link_alone_is_no_claim",
    ),
    Mutant(
        "one silent link counted as loss", "mcft/failover.py",
        "if view.silent_ms > settings.loss_ms and stream != \"alive\":",
        "if view.stream_silent_ms > settings.loss_ms and stream != \"alive\":",
        "failover.py::test_one_silent_link_is_not_the_loss_of_the_peer",
    ),
    Mutant(
        "the oldest link's word counts", "mcft/failover.py",
        "max(self.links.values(), default", "min(self.links.values(), default",
        "failover.py::test_one_silent_link_is_not_the_loss_of_the_peer",
    ),
    Mutant(
        "our own stall counted as the peer's silence", "mcft/failover.py",
        "        self._floor_ms = now_ms\n        return True", "        return True",
        "failover.py::test_own_stall_restarts_the_silence",
    ),
    Mutant(
        "an unarmed standby takes over", "mcft/failover.py",
        "    if not view.armed:\n        return Verdict(Act.WAIT, \"not armed",
        "    if False:\n        return Verdict(Act.WAIT, \"not armed",
        "failover.py::test_what_no_view_may_lead_to",
    ),
    Mutant(
        "a copy with a disk error claims", "mcft/failover.py",
        "    if view.disk_error:\n        return Verdict(Act.ALARM", "    if False:\n        return Verdict(Act.ALARM",
        "failover.py::test_what_no_view_may_lead_to",
    ),
    Mutant(
        "a guest's shutdown is taken over", "mcft/failover.py",
        'if view.peer_qemu == "shutdown":', "if False:",
        "failover.py::test_what_no_view_may_lead_to",
    ),
    Mutant(
        "a standby without LAN claims", "mcft/failover.py",
        "        if not view.lan_ok:\n            return Verdict(Act.ALARM, \"the primary is silent",
        "        if False:\n            return Verdict(Act.ALARM, \"the primary is silent",
        "failover.py::test_what_no_view_may_lead_to",
    ),
    Mutant(
        "a gone QEMU whose gate is open is claimed", "mcft/failover.py",
        'if view.peer_qemu == "gone" and view.peer_closed:', 'if view.peer_qemu == "gone":',
        "failover.py::test_what_no_view_may_lead_to",
    ),
    # ---- records ----
    Mutant(
        "unknown taken as given-up", "mcft/generations.py",
        "    if peer.has(Kind.GIVEN_UP):\n        return \"solo\"\n    return \"unknown\"",
        "    return \"solo\"",
        "generations.py::test_peer_records_mean_only_given_up_or_taken",
    ),
    Mutant(
        "an absent peer taken as given-up", "mcft/generations.py",
        "        return \"unknown\"\n    if peer.has(Kind.TAKEN):",
        "        return \"solo\"\n    if peer.has(Kind.TAKEN):",
        "generations.py::test_others_records_are_no_consent",
    ),
    Mutant(
        "another instance's word counts", "mcft/generations.py",
        "if peer is None or peer.pid != primary.pid or", "if peer is None or",
        "generations.py::test_others_records_are_no_consent",
    ),
    Mutant(
        "taken becomes given-up", "mcft/generations.py",
        "if standby.newest in (Kind.TAKEN, Kind.LOST, Kind.ENDED):", "if standby.newest in (Kind.LOST, Kind.ENDED):",
        "generations.py::test_taken_never_becomes_given_up",
    ),
    Mutant(
        "given-up written after taken", "mcft/generations.py",
        "Kind.GIVEN_UP: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE})",
        "Kind.GIVEN_UP: frozenset({Kind.PREPARING, Kind.ARMED, Kind.NOT_WHOLE, Kind.TAKEN})",
        "generations.py::test_every_pair",
    ),
    Mutant(
        "an unarmed standby may take", "mcft/generations.py",
        "if standby.newest in (Kind.ARMED, Kind.TAKEN):",
        "if standby.newest in (Kind.PREPARING, Kind.ARMED, Kind.TAKEN):",
        "generations.py::test_may_arm_and_may_take",
    ),
    Mutant(
        "taken written by an unarmed standby", "mcft/generations.py",
        "Kind.TAKEN: frozenset({Kind.ARMED})", "Kind.TAKEN: frozenset({Kind.PREPARING, Kind.ARMED})",
        "generations.py::test_every_pair",
    ),
    Mutant(
        "a copy that is not whole may take", "mcft/generations.py",
        "if standby.newest in (Kind.ARMED, Kind.TAKEN):",
        "if standby.newest in (Kind.ARMED, Kind.TAKEN, Kind.NOT_WHOLE):",
        "generations.py::test_may_arm_and_may_take",
    ),
    Mutant(
        "solo opens before it is spoken", "mcft/generations.py",
        'return "" if primary.spoken else "the win is not spoken yet"', 'return ""',
        "generations.py::test_may_open",
    ),
    # ---- keepalives ----
    Mutant(
        "the MAC is not looked at", "mcft/keepalive.py",
        "if not hmac.compare_digest(hmac.digest(self.key, body, sha256)[:MAC_BYTES], mac):", "if False:",
        "keepalive.py::test_any_changed_byte_is_refused",
    ),
    Mutant(
        "a new nonce is believed at once", "mcft/keepalive.py",
        "if not ours or echo not in self._sent_ms:", "if False:",
        "keepalive.py::test_old_datagrams_mean_nothing_to_a_restarted_gate",
    ),
    Mutant(
        "an old nonce is believed again", "mcft/keepalive.py",
        "if nonce in self._retired:", "if False:",
        "keepalive.py::test_a_dead_process_is_not_believed_again",
    ),
    Mutant(
        "an echo of a foreign nonce counts", "mcft/keepalive.py",
        "echo if echo_nonce == self.nonce and echo <= self.counter else 0", "echo if echo <= self.counter else 0",
        "keepalive.py::test_echo_of_a_foreign_nonce_gives_nothing",
    ),
    Mutant(
        "counters may fall", "mcft/keepalive.py",
        "if counter < self.peer_counter or (counter", "if (counter",
        "keepalive.py::test_counters_that_are_believed_never_fall",
    ),
    # ---- the buffer ----
    Mutant(
        "a barrier cuts frames", "mcft/filterbuffer.py",
        "        self.held += self.open_epoch[:whole]\n        del self.open_epoch[:whole]",
        "        self.held += self.open_epoch\n        self.open_epoch.clear()",
        "filterbuffer.py::test_half_a_frame_belongs_to_the_next_epoch",
    ),
    Mutant(
        "a release lets the open epoch out", "mcft/filterbuffer.py",
        "        self.sending += self.held\n        self.held.clear()\n        self.flush()",
        "        self.sending += self.held + self.open_epoch\n        self.held.clear()\n"
        "        self.open_epoch.clear()\n        self.flush()",
        "filterbuffer.py::TestEpochs",
    ),
    Mutant(
        "a barrier leaves what nobody has read", "mcft/filterbuffer.py",
        '        """All that has been sent so far, by every NIC, is before the barrier."""\n        self._drain()\n',
        '        """All that has been sent so far, by every NIC, is before the barrier."""\n',
        "filterbuffer.py::test_barrier_includes_what_nobody_has_read_yet",
    ),
    Mutant(
        "the new pair is put behind the old one", "mcft/filterbuffer.py",
        'place = {"insert": "behind",', 'place = {"insert": "before",',
        "filterbuffer.py::test_the_new_pair_sees_packets_first_and_outdev_before_indev",
    ),
    # ---- the gate's process ----
    Mutant(
        "a copy whose load is late is not woken", "mcft/gate/standby.py",
        "            self._wake()\n", "            pass\n",
        "gate.py::test_a_standby_whose_load_is_late_is_woken_again_and_again",
    ),
    Mutant(
        "a standby forgets what it echoed to an unproven process", "mcft/gate/standby.py",
        "            heard_ms = self.gate.session.peer_heard_ms if proven else now_ms\n",
        "            heard_ms = self.gate.session.peer_heard_ms\n",
        "gate.py::TestLease",
    ),
    Mutant(
        "a restarted standby does not wait T", "mcft/gate/standby.py",
        "self._no_echo_until_ms = boottime_ms() + self.gate.state.loss_ms", "pass",
        "gate.py::test_standby_restarted_after_taken_waits_too",
    ),
    Mutant(
        "a take-over does not wait for the lease", "mcft/gate/standby.py",
        "lambda: boottime_ms() >= self.earliest_ms()", "lambda: True",
        "gate.py::test_the_lease_is_over_before_the_copy_runs",
    ),
    Mutant(
        "a take-over before the last load's end", "mcft/gate/standby.py",
        "ended = yield self.gate.wait(self._stream_over, EXIT_EVENT_MS)", "ended = True",
        "gate.py::test_the_last_checkpoint_is_loaded_before_the_copy_runs",
    ),
    Mutant(
        "a missed end of the stream taken as ended", "mcft/gate/standby.py",
        'if reply.get("return", {}).get("mode") == "none":', "if True:",
        "gate.py::test_a_missed_end_of_the_stream_is_asked_for",
    ),
    Mutant(
        "a take-over without taken(g)", "mcft/gate/standby.py",
        'if self.gate.state.record not in ("taken",):', "if False:",
        "gate.py::test_taking_needs_taken",
    ),
    Mutant(
        "a claiming standby still says armed", "mcft/gate/standby.py",
        "        self.gate.state.claiming = True\n", "        pass\n",
        "gate.py::test_standby_claims_at_silence_and_never_says_armed_again",
    ),
    Mutant(
        "a standby lets its guest run ahead", "mcft/gate/standby.py",
        "            self._load_ms = now_ms\n"
        "            self._stop()",
        "            self._load_ms = now_ms",
        "gate.py::test_standby_stops_the_guest_after_each_load",
    ),
    Mutant(
        "any generation's armed gives a lease", "mcft/gate/primary.py",
        'if word.role != "standby" or word.g != self.gate.state.g:', 'if word.role != "standby":',
        "gate.py::test_armed_word_of_another_generation_gives_no_lease",
    ),
    Mutant(
        "a restarted primary's gate passes", "mcft/gate/filter.py",
        "        self.buffer.mode = self.gate.state.mode\n", "        pass\n",
        "gate.py::test_restarted_gate_releases_nothing_of_the_old_ones",
    ),
    Mutant(
        "checkpoints leave the guest no time, unnoticed", "mcft/gate/pace.py",
        "if share < LEAST_SHARE:", "if share < 0:",
        "gate.py::test_checkpoints_that_leave_the_guest_no_time_are_told",
    ),
    Mutant(
        "a stretched period becomes the guest's delay", "mcft/agent/pacing.py",
        "await self._change(body.delay_ms, every_ms)", "await self._change(every_ms, every_ms)",
        "pacing.py::test_a_period_is_stretched_on_both_sides_and_the_delay_stays_as_asked",
    ),
    Mutant(
        "a word about the pace from before a longer delay counts", "mcft/agent/pacing.py",
        " or every_ms < body.delay_ms:", ":",
        "pacing.py::test_a_word_from_before_a_longer_delay_is_void",
    ),
    Mutant(
        "an answer of the LAN from before the loss lets a host that is cut off take over", "mcft/gate/lan.py",
        "        self.ask(now_ms)\n        self._forgotten = self._sequence\n", "        self.ask(now_ms)\n",
        "gate.py::test_an_answer_of_before_the_loss_is_none",
    ),
    Mutant(
        "an instance that is over writes its body over the living one's", "mcft/agent/store.py",
        "row is not None and instance_of(row[0]) == instance_of(body)", "row is not None",
        "store.py::test_what_is_over_or_replaced_is_not_written_any_more",
    ),
    Mutant(
        "a gate obeys another instance's agent", "mcft/gate/core.py",
        'if request.get("pid", self.state.pid) != self.state.pid:', "if False:",
        "gate.py::test_another_instances_agent_opens_nothing",
    ),
    Mutant(
        "after a forced failover it is protected again by itself", "mcft/agent/standby.py",
        "self.body.manual = reason if override else manual", "self.body.manual = manual",
        "acts.py::test_after_an_operators_word_nothing_is_protected_by_itself",
    ),
    Mutant(
        "a standby that must not take over is said to survive a loss", "mcft/agent/statusview.py",
        'forbidden = standbys_lan if primary else gate.get("alarm", "")', 'forbidden = "" if primary else ""',
        "statusview.py::test_a_standby_that_must_not_take_over_is_no_help",
    ),
    Mutant(
        "an operator's word is taken though the arbiter has decided", "mcft/agent/protection.py",
        "            if await self._arbiter_decides():\n", "            if False:\n",
        "acts.py::test_an_arbiter_that_answers_goes_before_an_operators_word",
    ),
    Mutant(
        "a change of the delay that failed half way stays so", "mcft/agent/pacing.py",
        "if (state.delay_ms, qemus_ms) != (delay_ms, every_ms):", "if False:",
        "pacing.py::test_a_change_that_fails_is_put_back_as_soon_as_that_can_be",
    ),
    Mutant(
        "a watcher goes by a shorter delay before QEMU does", "mcft/agent/pacing.py",
        "await self._apply(delay_ms, every_ms, max(was_ms, every_ms))", "await self._apply(delay_ms, every_ms, every_ms)",
        "pacing.py::test_a_shorter_delay_is_gone_by_by_no_watcher_before_qemu_has_it",
    ),
    Mutant(
        "opening while protected", "mcft/gate/primary.py",
        'request.get("because") not in ("solo", "given-up")', "False",
        "gate.py::test_opening_needs_given_up_or_a_win",
    ),
    Mutant(
        "a disk error is not seen", "mcft/gate/primary.py",
        "elif name in DISK_ERRORS:", "elif False:",
        "gate.py::test_errors_break_the_stream_before_anything_else_is_acknowledged",
    ),
    Mutant(
        "a disk error before the first capture is not seen", "mcft/gate/primary.py",
        "elif name in DISK_ERRORS:", "elif self.commit.stats.captures and name in DISK_ERRORS:",
        "gate.py::test_disk_error_before_the_first_capture_counts_too",
    ),
    Mutant(
        "a guest goes on over a disk that lost a write", "mcft/gate/primary.py",
        'own = name == "QUORUM_REPORT_BAD"', 'own = False and name == "QUORUM_REPORT_BAD"',
        "gate.py::test_an_error_of_the_primarys_own_disk_ends_its_qemu",
    ),
    Mutant(
        "a muted guest goes on over a disk that lost a write", "mcft/gate/primary.py",
        'if own and mode in ("hold", "closed")', 'if own and mode == "hold"',
        "gate.py::test_an_error_of_the_primarys_own_disk_counts_while_it_is_muted_too",
    ),
    Mutant(
        "a copy whose stream ended by itself counts as whole", "mcft/gate/standby.py",
        "if follows and lives and self._exit_ms and", "if False and",
        "gate.py::test_a_stream_that_ended_while_the_primary_lives_leaves_no_whole_copy",
    ),
    Mutant(
        "a load that failed under a silent primary counts as its death", "mcft/gate/standby.py",
        "if self._following and not self._exited and self._stream_is_open():", "if False:",
        "gate.py::test_a_stream_that_ended_here_leaves_no_whole_copy_though_the_primary_is_silent",
    ),
    Mutant(
        "a copy whose primary has just died counts as not whole", "mcft/gate/standby.py",
        "now_ms - self._exit_ms > state.loss_ms", "now_ms >= self._exit_ms",
        "gate.py::test_a_stream_that_ended_with_its_primary_leaves_a_whole_copy",
    ),
    Mutant(
        "a standby that gave up while its gate was away calls itself protected", "mcft/agent/standby.py",
        "        if self.ledger.newest is Kind.ARMED:  # (its gate", "        if True:  # (its gate",
        "arming.py::test_given_up_while_its_gate_was_away_it_is_not_protected",
    ),
    Mutant(
        "a committed overlay stays", "mcft/gate/standby.py",
        "_forget_file(state.overlays.pop(target))", "state.overlays.pop(target)",
        "gate.py::test_an_overlay_that_qemu_has_committed_is_removed",
    ),
    Mutant(
        "the copy runs before its overlay is gone", "mcft/gate/standby.py",
        "        yield from self._retire_overlays(COMMIT_POLL_MS, boottime_ms() + COMMIT_WAIT_MS)\n", "",
        "gate.py::test_an_overlay_that_qemu_has_committed_is_removed",
    ),
    Mutant(
        "a copy that QEMU resumed by itself runs on while its overlay is there", "mcft/gate/standby.py",
        'elif name == "RESUME" and self._held:', 'elif name == "RESUME" and False:',
        "gate.py::test_an_overlay_that_qemu_has_committed_is_removed",
    ),
    Mutant(
        "a commit that never ends is waited for", "mcft/gate/standby.py",
        "COMMIT_WAIT_MS = 2000.0", "COMMIT_WAIT_MS = 200000.0", "gate.py::test_a_commit_that_takes_long_is_not_waited_for",
    ),
    Mutant(
        "an overlay goes before it is committed", "mcft/gate/standby.py",
        "if t not in uncommitted(reply[\"return\"])]", "]", "gate.py::test_an_overlay_that_qemu_has_committed_is_removed",
    ),
    Mutant(
        "a file in use is overwritten", "mcft/agent/overwriting.py",
        "if user := user_of(path):", "if False and (user := user_of(path)):",
        "labels.py::test_a_file_that_is_open_is_never_replaced",
    ),
    Mutant(
        "a chain is overwritten", "mcft/agent/overwriting.py",
        '"bad", "following")', '"bad", "following", "chain")', "labels.py::test_what_may_be_the_truth_is_not",
    ),
    Mutant(
        "the kernel learns of a lease after what leaves by it", "mcft/gate/primary.py",
        "                if not self.closed():\n"
        "                    self.output.lease_until(self.commit.lease_until_ms)\n"
        "                self._apply(actions, now_ms)\n",
        "                self._apply(actions, now_ms)\n"
        "                if not self.closed():\n"
        "                    self.output.lease_until(self.commit.lease_until_ms)\n",
        "taplease.py::test_the_kernel_knows_the_lease_before_anything_leaves_by_it",
    ),
    Mutant(
        "a keepalive gives a closed gate's tap a lease again", "mcft/gate/primary.py",
        "                if not self.closed():\n                    self.output.lease", "                self.output.lease",
        "taplease.py::test_once_closed_no_keepalive_opens_it",
    ),
    Mutant(
        "a lease that was taken back stands at the tap", "mcft/gate/primary.py",
        "            self.commit.lease_withdrawn()\n            self.output.lease_until(self.commit.lease_until_ms)\n",
        "            self.commit.lease_withdrawn()\n",
        "taplease.py::test_a_lease_that_is_taken_back_ends_at_once",
    ),
    Mutant(
        "a late keepalive ends what may speak", "mcft/gate/filter.py",
        '        if self.buffer.mode != "pass":\n            self.lease.until', "        if True:\n            self.lease.until",
        "taplease.py::test_what_may_speak_has_no_end",
    ),
    Mutant(
        "a gate that starts anew trusts its dead predecessor's lease", "mcft/gate/filter.py",
        '        self.buffer.mode = self.gate.state.mode\n        self.lease_until(float("-inf"))\n',
        "        self.buffer.mode = self.gate.state.mode\n",
        "taplease.py::test_a_gate_that_starts_anew_lets_nothing_out_before_its_first_lease",
    ),
    Mutant(
        "a closed buffer is not corked", "mcft/filterbuffer.py",
        "        if self.corked:\n            return\n", "",
        "filterbuffer.py::test_closed_stops_what_was_released_but_not_yet_written",
    ),
    # ---- the hook, status ----
    Mutant(
        "an expired token is accepted", "mcft/hook.sh",
        '[ "${uptime%%.*}" -le "${t_expires:-0}" ]', "true",
        "hook.py::test_wrong_tokens",
    ),
    Mutant(
        "a token of an earlier boot is accepted", "mcft/hook.sh",
        '[ "$t_boot" = "$boot" ]', "true",
        "hook.py::test_wrong_tokens",
    ),
    Mutant(
        "an unreadable marker is free", "mcft/hook.sh",
        "|| word=unreadable", "|| word=free",
        "hook.py::test_unreadable_marker_refuses_that_domain_only",
    ),
    Mutant(
        "reconnect is refused", "mcft/hook.sh",
        "prepare | start | restore | migrate) ;;", "prepare | start | restore | migrate | reconnect) ;;",
        "hook.py::test_what_must_never_be_refused",
    ),
    Mutant(
        "status: safe without a gate's lease", "mcft/agent/statusview.py",
        'gate.get("lease") if primary else', "True if primary else",
        "statusview.py::test_no_lease_or_no_load_survives_nothing",
    ),
    Mutant(
        "status: unbuffered counts as safe", "mcft/agent/statusview.py",
        "bool(following) and not unsafe", "bool(following)",
        "statusview.py::test_unbuffered_is_unsafe",
    ),
]  # fmt: skip


def copy_tree(to: Path) -> None:
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis", "lab"))
        elif source.exists():
            shutil.copy2(source, to / name)


def run_tests(tree: Path, *nodes: str) -> subprocess.CompletedProcess[str]:
    """PYTHONPATH first: an installed (editable) mcft must not be tested in place of the copy."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *nodes],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip


def applies(mutant: Mutant, tree: Path) -> str:
    """Empty, or why the edit no longer fits its file."""
    count = (tree / mutant.file).read_text().count(mutant.old)
    return "" if count == 1 else f"its old text occurs {count} times in {mutant.file}"


def survives(mutant: Mutant, base: Path) -> str:
    """Empty if a test fails with this error in place, else what is wrong."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        tree = Path(name) / "t"
        shutil.copytree(base, tree)
        path = tree / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        if path.suffix == ".py":
            compile(path.read_text(), str(path), "exec")
        done = run_tests(tree, TESTS + mutant.test)
    # 1: tests failed. 0: none did. Anything else (no such test, no collection) proves nothing.
    return "" if done.returncode == 1 else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"


def main(words: list[str]) -> int:
    """0 if every deliberate error is found."""
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        base = Path(name)
        copy_tree(base)
        for mutant in chosen:
            if reason := applies(mutant, base):
                wrong.append(f"{mutant.name}: does not apply: {reason}")
        if not wrong:
            nodes = sorted({TESTS + m.test for m in chosen})
            clean = run_tests(base, *nodes)
            if clean.returncode:
                wrong.append(f"without any error the tests don't pass:\n{clean.stdout[-2000:]}")
        if not wrong:
            with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
                for mutant, reason in zip(chosen, pool.map(lambda m: survives(m, base), chosen), strict=True):
                    print(f"{'SURVIVED' if reason else 'found   '}  {mutant.name}", flush=True)
                    if reason:
                        wrong.append(f"{mutant.name}: survived {mutant.test}: {reason}")
    print("\n".join([*wrong, f"{len(chosen)} deliberate errors, {len(wrong)} problems"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
