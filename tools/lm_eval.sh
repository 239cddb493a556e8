#!/usr/bin/env bash
# Installs lm-evaluation-harness for tests into .tools/lm-eval/: an environment of its own that also sees .venv's packages.
# In .venv itself its scikit-learn would slow the start of everything that imports transformers.
# If that is impossible, one line says so, and the tests of lm-evaluation-harness skip themselves.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.4.13
folder=.tools/lm-eval-$version
# What it needs and .venv has not.
packages=(
    "lm-eval==$version" chardet==6.0.0.post1 dataproperty==1.1.1 defusedxml==0.7.1 evaluate==0.4.6 joblib==1.6.0
    lxml==6.1.3 mbstrdecoder==1.1.5 more-itertools==11.2.1 narwhals==2.29.0 nltk==3.10.4 pathvalidate==3.3.1
    portalocker==4.4.2 pytablewriter==1.2.1 python-dateutil==2.9.0.post0 pytz==2026.6 rouge-score==0.1.2
    sacrebleu==2.6.0 scikit-learn==1.9.1 six==1.17.0 sqlitedict==2.1.0 tabledata==1.3.5 tabulate==0.10.0
    tcolorpy==0.1.7 tenacity==9.2.1 threadpoolctl==3.8.0 typepy==1.3.5 word2number==1.1
)

if [ ! -f "$folder/.ready" ]; then
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder"
    packages_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    packages_of .venv/bin/python >"$(packages_of "$folder/bin/python")/loraf.pth"
    if ! .venv/bin/uv pip install --quiet --python "$folder/bin/python" --no-deps "${packages[@]}"; then
        echo "lm-eval: skipped: pip could not install lm-eval==$version"
        exit 0
    fi
    touch "$folder/.ready"
fi
ln -sfn "lm-eval-$version" .tools/lm-eval
