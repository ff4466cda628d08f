# One place for every command. `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

TARGET := $(or $(CARGO_TARGET_DIR),target)
# The programs are built for a named target, so that they can be linked statically while build scripts and macros are not: the
# same file runs here and alone in an image.
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
BIN := $(TARGET)/$(HOST)/release
K8S := $(abspath $(TARGET))/k8s/bin
CONFORMANCE := $(abspath $(TARGET))/k8s/conformance
STATIC := CARGO_TARGET_$(shell echo $(HOST) | tr 'a-z-' 'A-Z_')_RUSTFLAGS="-C target-feature=+crt-static"
PROGRAMS := culvert-cli culvert-ztunnel culvert-waypoint culvert-controller culvert-bench
DENY_VERSION := 0.20.2
MUTANTS_VERSION := 27.1.0
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)

# Network namespaces need root; cargo itself does not.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
AS_ROOT := $(if $(ROOT),CARGO_TARGET_$(shell echo $(HOST) | tr 'a-z-' 'A-Z_')_RUNNER="sudo -E env PATH=$$PATH")

# The end-to-end tests by name, so that they build with the same features as the rest of the workspace, thus only once.
# `ambient` needs a program that is not ours: see interop. `api_scale` measures, and is for a machine that does nothing else.
E2E := $(filter-out ambient api_scale,$(sort $(basename $(notdir $(wildcard e2e/tests/*.rs))) $(notdir $(patsubst %/main.rs,%,$(wildcard e2e/tests/*/main.rs)))))
E2E_FLAGS = $(addprefix --test ,$(1)) -- --test-threads=1

.PHONY: help build demo test test-all mutants lint advisories unit e2e demo-check interop soak bench bench-scale cluster-programs api-server kubernetes conformance conformance-programs cluster cluster-down images fmt clean setup-build setup-run setup-test setup-deny setup-mutants setup-cluster

help: ## List the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

build: setup-build ## Build the programs, optimised and static, into target/HOST/release
	$(STATIC) cargo build --release --target $(HOST) --locked $(addprefix -p ,$(PROGRAMS))

demo: setup-run build ## Run a mesh of network namespaces on this machine and check what it promises
	$(ROOT) $(BIN)/culvert demo

test: ## Everything a change must pass (what .ci/run runs); installs what it lacks
	@rm -rf $(TARGET)/tiers
	@# Every tier runs, so that one run shows all that is wrong.
	@failed=; for tier in lint unit e2e demo-check; do $(MAKE) --no-print-directory $$tier || failed="$$failed $$tier"; done; \
		[ -z "$$failed" ] || { echo "=== failed:$$failed"; exit 1; }
	@cargo run --locked --quiet -p culvert-xtask -- ledger
	@echo "=== all tiers"; cat $(TARGET)/tiers/summary

test-all: test advisories ## `make test`, and what does not fit into its time: ignored tests, advisories, the benchmark
	@# culvert-runtime's one ignored test is the child of another.
	e2e/conformance/build $(CONFORMANCE) v1.7.0
	CULVERT_BIN_DIR=$(abspath $(BIN)) KUBERNETES_BIN=$(K8S) CONFORMANCE_BIN=$(CONFORMANCE) $(AS_ROOT) scripts/tier ignored cargo test --locked --workspace --exclude culvert-runtime -- --ignored --test-threads=1
	@$(MAKE) --no-print-directory api-server
	@$(MAKE) --no-print-directory bench
	@$(MAKE) --no-print-directory bench-scale

lint: setup-build setup-deny ## Formatting, clippy, documentation, layers, sizes, book, dependencies
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --locked --workspace --no-deps --document-private-items --quiet
	cargo run --locked --quiet -p culvert-xtask -- all
	cargo deny --locked check --hide-inclusion-graph bans licenses sources

advisories: setup-deny ## Known vulnerabilities of dependencies (fetches the RustSec database from its git host)
	cargo deny --locked check --hide-inclusion-graph advisories

unit: setup-test ## Tests in memory and of single crates (some make network namespaces)
	$(AS_ROOT) scripts/tier unit cargo test --locked --no-fail-fast --workspace --exclude culvert-e2e

e2e: setup-test build cluster-programs conformance-programs ## Whole meshes of the optimised programs, one at a time: on this machine, and in a real Kubernetes
	CULVERT_BIN_DIR=$(abspath $(BIN)) KUBERNETES_BIN=$(K8S) CONFORMANCE_BIN=$(CONFORMANCE) $(AS_ROOT) scripts/tier e2e cargo test --locked --no-fail-fast --workspace $(call E2E_FLAGS,$(E2E))

demo-check: setup-run build ## The demo as one more check: every line must hold, within 60 seconds
	scripts/tier demo $(ROOT) timeout --kill-after=30 60 $(BIN)/culvert demo -o json

# The files of the tunnel that decide; what they decide with is culvert-model.
DECIDES := agent/exclusions agent/plan control dns/answer dns/lookup dns/names inbound/authorize inbound/rejudge inbound/target \
	outbound/connect outbound/endpoints outbound/handover outbound/lookup outbound/resolve outbound/retry

# Quicker: no debug information to link, and a failing case is not made smaller, since only that it fails counts.
mutants: export CARGO_PROFILE_DEV_DEBUG = 0
mutants: export PROPTEST_MAX_SHRINK_ITERS = 0
mutants: setup-test setup-mutants ## Change each line that decides; some test has to notice (hours on two cores)
	@mkdir -p $(TARGET)/mutants
	cargo mutants -p culvert-model --minimum-test-timeout 60 -o $(TARGET)/mutants/model $(MUTANTS) -- --lib --test decisions
	$(AS_ROOT) cargo mutants -p culvert-ztunnel $(DECIDES:%=-f ztunnel/src/%.rs) --minimum-test-timeout 60 -o $(TARGET)/mutants/ztunnel $(MUTANTS) -- --lib
	cargo run --locked --quiet -p culvert-xtask -- mutants $(TARGET)/mutants/model $(TARGET)/mutants/ztunnel

interop: setup-test build ## The tests against the Go peer made of Istio's packages; with ZTUNNEL=PATH also an ambient ztunnel
	CULVERT_BIN_DIR=$(abspath $(BIN)) $(AS_ROOT) cargo test --locked --workspace $(call E2E_FLAGS,$(filter interop%,$(E2E)))
	@$(if $(ZTUNNEL),CULVERT_BIN_DIR=$(abspath $(BIN)) ZTUNNEL=$(abspath $(ZTUNNEL)) $(AS_ROOT) \
		cargo test --locked --workspace $(call E2E_FLAGS,ambient) --nocapture)

soak: setup-test build ## A day in five minutes: connections, pods, policies and certificates come and go, and leave nothing behind
	CULVERT_BIN_DIR=$(abspath $(BIN)) $(AS_ROOT) cargo test --locked --workspace $(call E2E_FLAGS,soak) --ignored --nocapture

bench: setup-run build ## What the tunnel costs, beside direct TCP in the same run
	$(ROOT) $(BIN)/culvert-bench run

bench-scale: setup-run build ## 100,000 workloads through two proxies, all of them changing; fails where a bound is crossed
	$(ROOT) $(BIN)/culvert-bench scale --check

cluster-programs: setup-cluster ## Build the real Kubernetes, helm and DNS server that a test cluster needs, into target/k8s/bin
	e2e/cluster/tools/build $(K8S)

api-server: setup-test build cluster-programs ## The tests under a real Kubernetes API server without nodes
	CULVERT_BIN_DIR=$(abspath $(BIN)) KUBERNETES_BIN=$(K8S) cargo test --locked --workspace $(call E2E_FLAGS,$(filter api_%,$(E2E)) api_scale) --nocapture

kubernetes: setup-test build cluster-programs ## The tests in a real Kubernetes of two nodes
	CULVERT_BIN_DIR=$(abspath $(BIN)) KUBERNETES_BIN=$(K8S) $(AS_ROOT) cargo test --locked --workspace $(call E2E_FLAGS,real_cluster) --nocapture

conformance-programs:
	e2e/conformance/build $(CONFORMANCE) v1.6.3

conformance: setup-test build cluster-programs conformance-programs ## The Gateway API's mesh tests of two versions, in a real Kubernetes
	e2e/conformance/build $(CONFORMANCE) v1.7.0
	CULVERT_BIN_DIR=$(abspath $(BIN)) KUBERNETES_BIN=$(K8S) CONFORMANCE_BIN=$(CONFORMANCE) $(AS_ROOT) cargo test --locked --workspace $(call E2E_FLAGS,conformance) --include-ignored --nocapture

CLUSTER := KUBERNETES_BIN=$(K8S) $(AS_ROOT) cargo run --locked --quiet -p culvert-cluster --

images: build ## Image archives of the static programs, without a container engine, into target/images
	@mkdir -p $(TARGET)/images
	@for program in controller ztunnel waypoint; do \
		cargo run --locked --quiet -p culvert-cluster -- image culvert/$$program:$(VERSION) $(BIN)/$$program $(TARGET)/images/$$program-$(VERSION).tar; done
	@ls -l $(TARGET)/images

cluster: setup-test build cluster-programs ## Start a real Kubernetes of two nodes on this machine, with the mesh's images on them
	@$(CLUSTER) up
	@for program in controller ztunnel waypoint; do $(CLUSTER) load docker.io/culvert/$$program:$(VERSION) $(BIN)/$$program; done
	@echo "install the mesh:  scripts/cluster culvert install"
	@echo "look around:       scripts/cluster kubectl get pods -A"
	@echo "end it:            make cluster-down"

cluster-down: ## End it and remove all that is left of it
	@$(CLUSTER) down

fmt: ## Format everything
	cargo fmt --all

clean: ## Remove what was built
	cargo clean

setup-build:
	@scripts/need cc make

setup-run: setup-build
	@scripts/need curl python3

setup-test: setup-run
	@scripts/need ip kill nft
	@command -v go >/dev/null || { echo "Go is missing (see https://go.dev/dl): the tests against Istio's packages need it" >&2; exit 1; }

setup-cluster:
	@scripts/need ip nft kill etcd containerd runc /usr/lib/cni/ptp /usr/bin/python3
	@command -v go >/dev/null || { echo "Go is missing (see https://go.dev/dl): Kubernetes is built with it" >&2; exit 1; }

setup-deny:
	@cargo deny --version 2>/dev/null | grep -q ' $(DENY_VERSION)$$' || cargo install cargo-deny --locked --version $(DENY_VERSION)

setup-mutants:
	@cargo mutants --version 2>/dev/null | grep -q ' $(MUTANTS_VERSION)$$' || cargo install cargo-mutants --locked --version $(MUTANTS_VERSION)
