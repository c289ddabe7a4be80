# Every habit of the project, as a short target. `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MEANDER_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/meander
export MEANDER_CACHE
# Outside of the clone, so that a fresh clone builds in seconds what another one has built.
export CARGO_TARGET_DIR ?= $(MEANDER_CACHE)/target

.PHONY: help demo demo-down test test-long chaos fuzz lint fmt crds released-crds binaries images sbom bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## From nothing to a running pipeline and a replay, on a cluster of its own
	@deploy/demo/demo.sh

demo-down: ## Take away what the demo made
	@tests/cluster/cluster.sh down

test: ## Everything that must hold before a change lands
	@tests/run.sh

test-long: ## The long forms of tests: a transaction of ten million rows, fifty kills, faults under load, the model further
	@tests/run.sh long

chaos: ## Forty faults under load, twenty more on a cluster, and a comparison of everything; MEANDER_CHAOS_FAULTS and _CLUSTER_FAULTS say how many
	@tests/run.sh chaos

fuzz: ## Ten minutes of wrong input for everything that reads it
	@tests/run.sh fuzz

lint: ## Formatting, clippy, dependency rules, generated files
	@tests/run.sh lint

fmt: ## Format all sources
	cargo fmt --all
	gofmt -w tests/verifier tests/cluster

crds: ## Write the CRDs and their reference anew from the Rust types
	cargo run -q -p meander-crds --bin crdgen

released-crds: crds ## Take the CRDs as they are for those of a release, which later ones may not break
	cp crds/*.yaml crds/released/

binaries: ## Static binaries for the images, in dist/
	@tests/setup.sh base rust
	@deploy/build-binaries.sh

images: binaries ## Container images; sizes are printed
	@tests/setup.sh cluster
	@deploy/build-images.sh

sbom: ## What the images are made of, as CycloneDX, in dist/
	@deploy/sbom.sh

bench: ## Speed, cost and latency, side by side with the peers and the limits, for hours
	@bench/run.sh
