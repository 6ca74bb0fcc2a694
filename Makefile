# Everything runs in an environment of its own: nothing has to be installed first but Python 3.11 to 3.14.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# An environment keeps the Python that it was first made with, whatever PYTHON says later: one that is too old makes none.
NEW_VENV = @$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old, 3.11 to 3.14 will do: give one, as in make demo PYTHON=python3.12" % sys.version_info[:2])' && $(PYTHON) -m venv

.PHONY: demo triton-demo test test-breadth test-slow test-docs test-transformers5 test-triton test-extras test-network check format gpu quality quality-report bench-train bench-engines bench-sweep bench-proof bench-serving bench-memory faults coverage release docs clean

demo: $(READY) ## prune a real model, build its engines and judge them: 10 to 19 minutes on 2 cores
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo c4-demo
	$(BIN)/trsp-deploy prune-and-build --model smollm2-135m --drop 25%

# The demo's run is made first where it is not there; the server is stopped whatever happens.
REPOSITORY := runs/model_repository
triton-demo: $(READY) .venv-triton/.ready ## the demo's run on a real tritonserver: a streamed answer, dense against pruned under load
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo c4-demo triton-schema
	$(BIN)/trsp-deploy prune-and-build --model smollm2-135m --drop 25%
	$(BIN)/trsp-deploy triton runs/smollm2-135m-drop8 --name smollm2-trsp --dense --out $(REPOSITORY)
	$(BIN)/trsp-deploy triton-lint $(REPOSITORY)
	trap '$(BIN)/trsp-deploy triton-stop $(REPOSITORY)' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; set -e; \
	$(BIN)/trsp-deploy triton-start $(REPOSITORY) --server .venv-triton --port 18000; \
	curl -sN --fail-with-body 127.0.0.1:18000/v2/models/smollm2-trsp/generate_stream \
	    -d '{"text_input": "The capital of France is", "max_tokens": 16, "stream": true}' \
	    | tee /dev/stderr | grep -E '"finish_reason": ?"(length|end|stop)"' > /dev/null; \
	$(BIN)/trsp-deploy triton-stop $(REPOSITORY); \
	$(BIN)/trsp-deploy bench-server $(REPOSITORY) --server .venv-triton --run runs/smollm2-135m-drop8 --new-tokens 32 --replicates 5

DEFAULT := not breadth and not slow and not network and not faults
test: $(READY) check ## style, types, import rule and the default tests, offline
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile -m '$(DEFAULT) and not alone'
	$(BIN)/python -m pytest -q -m '$(DEFAULT) and alone'

test-breadth: $(READY) ## what takes seconds each: whole jobs, and engines of more families, precisions and compilers: 25 minutes
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile -m 'breadth and not alone'
	$(BIN)/python -m pytest -q -m 'breadth and alone'

check: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pip check

test-slow: $(READY) ## minutes and gigabytes
	$(BIN)/python -m pytest -q -m slow

test-docs: $(READY) ## every line of the docs that runs this program, and their CI workflow, on tiny models: five minutes
	$(BIN)/python -m pytest -q -m slow tests/integration/test_docs_commands.py tests/integration/test_action.py

test-transformers5: .venv-transformers5/.ready ## export, parity and pruning where Optimum cannot be: about 5 minutes
	.venv-transformers5/bin/pip check
	.venv-transformers5/bin/python -m pytest -q --numprocesses auto --dist loadfile -m 'not network and not gpu' \
		tests/integration/test_exporters.py tests/integration/test_pipeline.py tests/integration/test_own_code.py \
		tests/unit/test_every_family.py tests/unit/test_decoder.py tests/unit/test_methods.py tests/unit/test_gates.py \
		tests/unit/test_selection_and_transfer.py tests/unit/test_refit.py tests/unit/test_self_calibration.py \
		tests/unit/test_losses.py tests/unit/test_trials.py tests/unit/test_models.py

test-triton: $(READY) .venv-triton/.ready ## the model repository on a real tritonserver: a minute
	$(BIN)/python -m pytest -q tests/integration/test_triton_repository.py \
		tests/integration/test_triton_server.py tests/integration/test_triton_step.py

test-extras: $(VENV)/.ready-extras ## zero-shot tasks through lm-eval and OpenSSF's signatures, which the other tests do without: two minutes
	$(BIN)/trsp-deploy fetch piqa
	$(BIN)/python -m pytest -q -m 'not network' tests/integration/test_zero_shot.py tests/unit/test_verification.py

test-network: $(READY) ## needs a package registry: the wheel in an empty environment
	$(BIN)/python -m pytest -q -m network

gpu: .venv-gpu/.ready ## tests that need a CUDA device, and the GPU bench: goes on where it stopped; ARGS='--only tensorrt'
	tested=0; .venv-gpu/bin/python -m pytest -q -m gpu tests/gpu || tested=$$?; \
		.venv-gpu/bin/python -m benchmarks.gpu $(ARGS) && exit $$tested

quality: $(VENV)/.ready-eval ## the quality table, row by row: hours long, goes on where it stopped; QUICK=1: about 10 minutes
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo c4-demo alpaca-demo piqa
	$(BIN)/python -m benchmarks.quality $(if $(QUICK),--quick) $(ARGS)

quality-report: $(READY) ## tables, plots and a JSON line from the rows that are there
	$(BIN)/python -m benchmarks.quality.report $(if $(QUICK),--quick) $(ARGS)

bench-train: $(READY) ## stage 2 against Hugging Face's Trainer on the same batches; QUICK=1: a minute
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki
	$(BIN)/python -m benchmarks.train $(if $(QUICK),--quick) $(ARGS)

bench-engines: $(READY) .venv-peers/.ready ## ours against Optimum, onnxruntime-genai and llama.cpp; QUICK=1: a few minutes
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo
	$(BIN)/python -m benchmarks.engines $(if $(QUICK),--quick) $(ARGS)

bench-sweep: $(READY) ## speed, memory and perplexity for 3, 6, 9 and 12 of 30 layers less, resumable: an hour
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki wiki-demo c4-demo
	$(BIN)/python -m benchmarks.sweep $(ARGS)

bench-proof: $(READY) ## can a comparison be believed? trials of known truth, under two hours, resumable; QUICK=1: ten minutes
	$(BIN)/python -m benchmarks.proof $(if $(QUICK),--quick) $(ARGS)

bench-serving: $(READY) .venv-triton/.ready ## a real tritonserver under load: what it costs, what batching gains; QUICK=1: three minutes
	$(BIN)/trsp-deploy fetch smollm2-135m exl-wiki triton-schema
	TRSP_DEPLOY_TRITON=.venv-triton $(BIN)/python -m benchmarks.serving $(if $(QUICK),--quick) $(ARGS)

bench-memory: $(READY) ## peak memory of exports, ours against plain Optimum, and of builds, on a random OPT-1.3B: 40 minutes, 20 GB of disk; QUICK=1: a small one
	$(BIN)/python -m benchmarks.memory $(if $(QUICK),--quick) $(ARGS)

faults: $(VENV)/.ready-eval ## kills, full disks, damage, Ctrl-C and 10,000 bad inputs, tried for real: about an hour; ARGS='-k killed'
	$(BIN)/trsp-deploy fetch piqa
	$(BIN)/python -m benchmarks.faults $(ARGS)

docs: $(VENV)/.ready-docs ## the docs as a site in site/, reference pages written anew; warnings are errors
	$(BIN)/python -m trsp_deploy.cli.reference docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # not --quiet, with which warnings count for nothing

# What the wheel brings where nothing is installed yet; without pip, which is not part of it. Everything but `gpu` and
# `tensorrt`, which are gigabytes and need `cpu` gone: EXTRAS=optimum,gpu,tensorrt.
EXTRAS ?= optimum,cpu,rtx,train,eval,signing
release: $(READY) ## wheel and sdist in dist/, with bill of materials, licences, and known vulnerabilities where a service is reached
	rm -rf dist .venv-release
	$(BIN)/python -m hatchling build -d dist
	$(NEW_VENV) --without-pip .venv-release
	$(BIN)/pip --python .venv-release/bin/python install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[$(EXTRAS)]"
	$(BIN)/python -m release .venv-release --extras $(EXTRAS) $(ARGS)

coverage: $(READY) ## which lines `test` and `test-breadth` run, processes that they start included: half an hour; then a JSON line
	$(BIN)/python -m benchmarks.coverage $(ARGS)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp comes last, so that an interrupted installation is taken up again. The bindings of TensorRT 10 and 11 are for the
# contract tests alone, which skip without them; they cannot be installed into one environment.
$(READY): pyproject.toml
	$(NEW_VENV) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[optimum,cpu,rtx,dev]'
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tensorrt-bindings/10 'tensorrt-cu12-bindings==10.16.*'
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/tensorrt-bindings/11 'tensorrt-cu13-bindings==11.4.*'
	-$(BIN)/trsp-deploy fetch triton-schema 2> /dev/null
	touch $(READY)

# TensorRT's wheels are not for every machine and fetch libraries from elsewhere; ONNX Runtime is timed without them.
.venv-gpu/.ready: pyproject.toml
	$(NEW_VENV) .venv-gpu
	.venv-gpu/bin/pip install --quiet --disable-pip-version-check -e '.[optimum,gpu,dev]'
	-.venv-gpu/bin/pip install --quiet --disable-pip-version-check -e '.[tensorrt]'
	-.venv-gpu/bin/pip install --quiet --disable-pip-version-check -e '.[rtx]'
	touch .venv-gpu/.ready

.venv-transformers5/.ready: pyproject.toml
	$(NEW_VENV) .venv-transformers5
	.venv-transformers5/bin/pip install --quiet --disable-pip-version-check -e '.[transformers5,cpu,rtx,dev]'
	touch .venv-transformers5/.ready

$(VENV)/.ready-eval: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[optimum,cpu,rtx,dev,eval]'
	touch $@

$(VENV)/.ready-extras: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[optimum,cpu,rtx,dev,eval,signing]'
	touch $@

$(VENV)/.ready-docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[optimum,cpu,rtx,dev,docs]'
	touch $@

# A real tritonserver and its load generator: it wants another numpy, and its Python backend imports what a repository needs.
.venv-triton/.ready:
	$(NEW_VENV) .venv-triton
	.venv-triton/bin/pip install --quiet --disable-pip-version-check 'nvidia-pytriton==0.7.0' 'numpy<2' \
	    'onnxruntime>=1.31,<1.33' tokenizers 'pydantic>=2.12,<3' 'pyyaml>=6,<7' 'perf-analyzer>=2.60,<3'
	touch $@

# Other engines, in an environment of their own: onnxruntime-genai's builder needs another transformers. llama.cpp is compiled,
# minutes long, and left out where it does not compile.
.venv-peers/.ready:
	$(NEW_VENV) .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check \
	    'onnxruntime-genai>=0.18,<0.19' 'onnxruntime>=1.31,<1.33' 'transformers>=5.17,<6' 'torch>=2.13,<2.16' onnx-ir
	-.venv-peers/bin/pip install --quiet --disable-pip-version-check 'llama-cpp-python>=0.3.16,<0.4'
	touch $@

clean: ## environments and what `release` and `docs` make; runs, which can be days of training, stay
	rm -rf $(VENV) .venv-peers .venv-release dist .venv-transformers5 .venv-triton .venv-gpu .venv313 site
