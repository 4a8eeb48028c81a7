#!/usr/bin/env bash
# An environment for a cluster without internet, made where there is one and copied there as a folder:
#
#     bash scripts/pack_env.sh [FOLDER] [-r REQUIREMENTS] [--python 3.11] [--platform manylinux_2_28_x86_64] [--conda]
#     tar cf env.tar FOLDER; scp env.tar cluster: ...; on the cluster: tar xf env.tar; bash FOLDER/install.sh .venv
#
# FOLDER (curvlab_env) holds the wheels of everything that REQUIREMENTS (requirements.txt) asks for, of this project, and
# install.sh, which makes a virtual environment of them without a network. Both machines need the same kind of processor;
# of another version of Python on the cluster, --python and --platform say so. --conda packs the active conda environment
# instead, with its Python, by conda-pack.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=curvlab_env
requirements=$root/requirements.txt
python=${PYTHON:-python3}
target=()
conda=

fail() {
  echo "error: $1" >&2
  exit 1
}

while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
    -r | --python | --platform) [ $# -gt 1 ] || fail "$1 needs a value behind it" ;;&
    -r) requirements=$2 && shift 2 ;;
    --python) target+=(--python-version "$2" --only-binary=:all:) && shift 2 ;;
    --platform) target+=(--platform "$2") && shift 2 ;;
    --conda) conda=1 && shift ;;
    -*) fail "unknown flag $1: there are -r, --python, --platform and --conda" ;;
    *) folder=$1 && shift ;;
  esac
done
[ -e "$folder" ] && fail "$folder is there already: remove it, or name another folder"
[ -f "$requirements" ] || fail "there is no file $requirements"

if [ -n "$conda" ]; then
  command -v conda-pack >/dev/null || fail "conda-pack is not installed: conda install -c conda-forge conda-pack, or leave --conda out"
  mkdir -p "$folder"
  conda-pack --output "$folder/env.tar.gz"
  cat >"$folder/install.sh" <<'INSTALL'
#!/usr/bin/env bash
# bash install.sh [ENVIRONMENT]: unpacks the environment there (.venv).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:-.venv}"
tar xzf "$here/env.tar.gz" -C "${1:-.venv}"
source "${1:-.venv}/bin/activate"
conda-unpack
INSTALL
  echo "$folder: copy it to the cluster, and there: bash $folder/install.sh .venv"
  exit 0
fi

mkdir -p "$folder/wheels"
trap 'rm -rf "$folder"' ERR # a half-full folder would look like a whole one
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$root"
if [ ${#target[@]} -gt 0 ]; then # wheels for another machine can be fetched, not built
  "$python" -m pip download --quiet "${target[@]}" --dest "$folder/wheels" -r "$requirements"
else
  "$python" -m pip wheel --quiet --wheel-dir "$folder/wheels" -r "$requirements"
fi
grep -v '^-r' "$requirements" >"$folder/requirements.txt"
(cd "$folder/wheels" && sha256sum -- *.whl >../SHA256SUMS)
cat >"$folder/install.sh" <<'INSTALL'
#!/usr/bin/env bash
# bash install.sh [ENVIRONMENT]: makes a virtual environment there (.venv) of the wheels beside this script, without a network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
(cd "$here/wheels" && sha256sum --quiet --check ../SHA256SUMS) || { echo "error: copy the folder again" >&2; exit 1; }
"${PYTHON:-python3}" -m venv "${1:-.venv}"
"${1:-.venv}/bin/python" -m pip install --quiet --no-index --find-links "$here/wheels" -r "$here/requirements.txt"
"${1:-.venv}/bin/python" -m pip install --quiet --no-index --no-deps --find-links "$here/wheels" curvlab
echo "installed: source ${1:-.venv}/bin/activate"
INSTALL
echo "$folder, $(du -sh "$folder" | cut -f1): copy it to the cluster, and there: bash $folder/install.sh .venv"
