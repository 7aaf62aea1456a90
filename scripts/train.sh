#!/bin/sh
# scripts/train.sh CONFIG [--section.key value ...]: convert, then train. CIFAR10_DIR names the data of who names no others; without it they
# are looked for where the recipe says (data/); where they are not, what was converted before is trained on, or they are
# downloaded. Only here, and only where all that fails (status 4), the same job runs on scikit-learn's digits. All this is for
# recipes of CIFAR-10: who names a place, or trains on images of their own, gets those or an error.
set -u
cd "$(dirname "$0")/.."
python=.venv/bin/python
config=$1
shift

convert() { "$python" write_datasets.py --config-file "$config" "$@"; }

own_recipe() { grep -qs '^ *train: .*\.beton' "$config" && ! grep -q cifar10_train.beton "$config"; }    # without: the default, CIFAR-10

own_data() {
    case " $* " in *" --sources.path"* | *" --sources.kind"*) return 0 ;; esac
    own_recipe
}

given() {    # given --KEY DEFAULT ARGUMENT...: the value of the key among the arguments
    key=$1 value=$2 before=
    shift 2
    for word; do
        case $word in "$key="*) value=${word#*=} ;; esac
        [ "$before" != "$key" ] || value=$word
        before=$word
    done
    printf '%s\n' "$value"
}

if [ -n "${CIFAR10_DIR:-}" ] && ! own_recipe; then
    convert "$@" --default-source "$CIFAR10_DIR" || exit
else
    status=0
    convert "$@" || status=$?
    if [ $status = 4 ] && own_data "$@"; then
        case " $* " in *" --sources."*) ;; *) echo "To name the folder: make train CONFIG=$config ARGS=\"--sources.path FOLDER\"" >&2 ;; esac
        exit 4
    fi
    train=$(given --beton.train data/cifar10_train.beton "$@") test=$(given --beton.test data/cifar10_test.beton "$@")
    if [ $status = 4 ] && [ -f "$train" ] && [ -f "$test" ]; then
        echo "What was converted before is there: $train and $test."
        status=0
    fi
    if [ $status = 4 ]; then
        echo "No data set is at hand: downloading CIFAR-10."
        status=0
        convert "$@" --sources.kind download || status=$?
    fi
    if [ $status = 4 ]; then
        config=rn_configs/digits.yaml
        echo
        echo "CIFAR-10 is neither here nor to be had from its server. To supply it:"
        echo "  make train CIFAR10_DIR=<folder with cifar-10-batches-bin/, cifar-10-batches-py/ or an official .tar.gz>"
        echo "Meanwhile the same job on the data set that needs no download, scikit-learn's digits ($config):"
        echo
        [ $# = 0 ] || echo "(without $*)"
        set --
        status=0
        convert || status=$?
    fi
    [ $status = 0 ] || exit $status
fi
exec "$python" ffcv_train.py --config-file "$config" "$@"
