# Everything a newcomer types. The machine: Debian 12 or 13; `test`, `demo`, `bench` and `evidence` need root (the lab).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SECONDS ?= 60
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 10

.PHONY: help venv lint test-unit test-lab test-kernel test-plug test-uml test-kvm test-rdma test-mc-plug test-oldlibvirt test-modular sim test-sim sim-exhaustive sim-errors test demo chaos recovery bench evidence mutants man clean

help:
	@echo 'make demo       lab, protect, power loss, take-over, protect back, planned switch home; ends with a table'
	@echo 'make test       all that follows but the long ones, and 4 minutes of chaos (root; installs what it needs by itself)'
	@echo 'make test-unit  three minutes, without root or libvirt'
	@echo 'make test-kernel  what needs another kernel, each also alone: test-plug (qdiscs) and test-uml (the whole lab on plug), both'
	@echo '                on user-mode Linux; test-kvm (plug under KVM and vhost-net) and test-rdma, each in a VM (root)'
	@echo 'make test-mc-plug  engine mc on plug, by its stand-in, in that VM: 12 minutes (root; not part of make test)'
	@echo 'make test-oldlibvirt  what agents ask of libvirt, on libvirtd 7.0 (root; not part of make test)'
	@echo 'make test-modular  protections on the modular daemons of libvirt (virtqemud), built from source (root; not part of make test)'
	@echo 'make sim        the protocol in a simulated world: SECONDS=60, and SEED=n replays one (docs/correctness.md)'
	@echo 'make bench      the figures, as ratios within one run'
	@echo 'make chaos      random real faults in the lab: MINUTES=4, and SEED=n repeats one (root)'
	@echo 'make recovery   what a client notices of each single fault, with etcd: TIMES=3 (root)'
	@echo 'make evidence   the long versions of the lab tests'

# The stamp changes with the lock file, so a pulled change of dependencies takes effect by itself.
$(VENV)/stamp: requirements-dev.lock
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { apt-get update -qq && apt-get install -qq -y python3-venv && $(PYTHON) -m venv $(VENV); }
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	touch $@

venv: $(VENV)/stamp

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test-unit: venv
	$(RUN) -m pytest tests/unit tests/replay

test-lab: venv
	lab/lab up
	$(RUN) -m pytest tests/lab -v; status=$$?; lab/lab down; exit $$status

# What this machine's kernel lacks.
test-kernel: test-plug test-uml test-kvm test-rdma

# The plug buffer, on a kernel that has it: user-mode Linux, fetched once by apt into lab/.cache. Its qdiscs alone: a minute; root.
test-plug: venv
	lab/uml $(CURDIR)/$(RUN) -m pytest tests/kernel --ignore=tests/kernel/lab -v -p no:cacheprovider

# Then under a real guest: the whole lab over there; and engine mc's story on plug as far as that kernel can tell it.
MC_ON_UML := tests/kernel/lab/test_mc.py::test_protect_and_set tests/kernel/lab/test_mc.py::test_killed_and_protected_back
test-uml: venv
	MCFT_UML_TIMEOUT_S=$(if $(MCFT_EVIDENCE),2400,1200) lab/uml --lab $(CURDIR)/$(RUN) -m pytest tests/kernel/lab -v -p no:cacheprovider
	MCFT_UML_TIMEOUT_S=1200 lab/uml --lab $(CURDIR)/$(RUN) -m pytest $(MC_ON_UML) -v -s -p no:cacheprovider

# And under one on KVM with vhost-net, in a VM whose processor is emulated.
test-kvm: venv
	MCFT_VM_TIMEOUT_S=900 lab/vm --lab $(CURDIR)/$(RUN) -m pytest tests/kernel/lab -v -s -p no:cacheprovider

# Engine mc's whole story on plug, by the stand-in, in the same VM: 12 minutes; root; part of `make evidence`, not of `make test`.
test-mc-plug: venv
	MCFT_VM_CPUS=1 MCFT_VM_TIMEOUT_S=1800 lab/vm --lab $(CURDIR)/$(RUN) -m pytest tests/kernel/lab/test_mc.py -v -s -p no:cacheprovider

# The RDMA keepalive, on rxe in a VM (QEMU without KVM): kernel and pyverbs fetched once by apt into lab/.cache. Root. Four minutes.
test-rdma: venv
	MCFT_VM_TIMEOUT_S=$(if $(MCFT_EVIDENCE),2400,900) lab/vm $(CURDIR)/$(RUN) -m pytest tests/rdma -v -s -p no:cacheprovider

# Every call of libvirt on Debian 11's libvirtd 7.0 with QEMU 5.2, fetched once by apt into lab/.cache; then whole protections by both
# engines on hosts that have it. Root. Four minutes.
OLD_LAB_TESTS := tests/lab/test_mc.py tests/lab/test_ends.py tests/lab/test_hosts.py tests/lab/test_processes.py::test_libvirtd
test-oldlibvirt: venv
	lab/old --lab $(CURDIR)/$(RUN) -m pytest tests/oldlibvirt -v -p no:cacheprovider
	MCFT_LAB=old MCFT_LAB_OLD=yes lab/lab up
	MCFT_LAB=old MCFT_LAB_OLD=yes $(RUN) -m pytest $(OLD_LAB_TESTS) -v; status=$$?; MCFT_LAB=old lab/lab down; exit $$status

# Hosts with virtqemud and its kin in place of libvirtd; Debian has none, so they are built once, in lab/.cache, from its own source of
# libvirt. Root. Twelve minutes, and two the first time.
MODULAR_TESTS := tests/lab/test_hosts.py tests/lab/test_ends.py tests/lab/test_processes.py tests/lab/test_mc.py \
	tests/lab/test_bad_input.py::test_no_hook tests/lab/test_maintenance.py::test_a_shutdown_is_maintenance_until_the_next_boot
test-modular: venv
	MCFT_LAB=mod MCFT_LAB_MODULAR=yes lab/lab up
	MCFT_LAB=mod MCFT_LAB_MODULAR=yes $(RUN) -m pytest $(MODULAR_TESTS) -v; status=$$?; MCFT_LAB=mod lab/lab down; exit $$status

# The real decision code in a deterministic world (docs/correctness.md): random faults, every interleaving, deliberate errors.
sim: venv
	$(RUN) -m tests.sim.run --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# What the simulation found once, then the same worlds each time (about a minute): a change is judged by what it changed, and
# chance, which still finds violations (docs/correctness.md, "Open"), has `make sim`.
test-sim: venv
	$(RUN) -m pytest tests/sim/test_found.py
	$(RUN) -m tests.sim.run --first 1 --steps 2000000

sim-exhaustive: venv
	$(RUN) -m tests.sim.exhaustive --seconds $(SECONDS)

sim-errors: venv
	$(RUN) -m tests.sim.errors

# (The same cases and faults each time, though never at the same microsecond: a change is judged by what it changed. Chance has
# `make chaos`, and each of these tests run by itself.)
test: export MCFT_SEED := $(or $(MCFT_SEED),1)
test: lint test-unit test-sim test-lab test-kernel
	$(MAKE) chaos SEED=1

demo: venv
	$(RUN) -m bench.demo

# Random real faults by each arbiter in turn; SEED repeats one.
MINUTES ?= 4
chaos: venv
	$(RUN) -m bench.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)); status=$$?; lab/lab down; exit $$status

# How long a client hears nothing after each single fault, with etcd: TIMES each, some 20 minutes for 3.
TIMES ?= 3
recovery: venv
	$(RUN) -m bench.chaos --each $(TIMES) --arbiters etcd; status=$$?; lab/lab down; exit $$status

bench: venv
	$(RUN) -m bench.figures

evidence: venv
	$(RUN) -m tests.sim.run --steps 20000000
	$(RUN) -m tests.sim.exhaustive --seconds 120
	$(RUN) -m tests.sim.errors
	$(RUN) -m bench.chaos --minutes 30
	$(RUN) -m bench.chaos --each 3 --arbiters etcd
	lab/lab up
	MCFT_EVIDENCE=1 $(RUN) -m pytest tests/lab -v; status=$$?; lab/lab down; exit $$status
	MCFT_EVIDENCE=1 $(MAKE) test-uml
	$(MAKE) test-mc-plug

mutants: venv
	$(RUN) tests/mutants.py

man:
	man -l man/mcft.1

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
