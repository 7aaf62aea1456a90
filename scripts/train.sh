#!/bin/sh
# scripts/train.sh CONFIG [--section.key value ...]: convert, then train. CIFAR10_DIR names the data; without it they are
# looked for where the recipe says (data/); where they are not, what was converted before is trained on, or they are
# downloaded. Only here, and only where all that fails (status 4), the same job runs on scikit-learn's digits. All this is for
# recipes of CIFAR-10: who names a place, or trains on images of their own, gets those or an error, whatever CIFAR10_DIR says,
# and where no place is named, betons of their own are trained on as they are.
set -u
cd "$(dirname "$0")/.."
python=.venv/bin/python
config=$1
shift

convert() { "$python" write_datasets.py --config-file "$config" "$@"; }

names_a_source() {    # in the arguments, or in the recipe
    case " $* " in *" --sources.path"* | *" --sources.kind"*) return 0 ;; esac
    grep -q '^ *\(path\|kind\): *[^ ]' "$config"
}

beton() {    # beton SPLIT [arguments]: the file that these or the recipe name
    split=$1
    shift
    found=$(sed -n "s/^ *$split: *\([^ #]*\.beton\).*/\1/p" "$config")
    while [ $# -gt 0 ]; do
        case $1 in
            --beton.$split=*) found=${1#*=} ;;
            --beton.$split) found=${2:-} ;;
        esac
        shift
    done
    echo "${found:-data/cifar10_$split.beton}"
}

own_recipe() { [ "$(beton train)" != data/cifar10_train.beton ]; }

train=$(beton train "$@") test=$(beton test "$@")
if names_a_source "$@"; then
    convert "$@" || exit
elif [ "$train" != data/cifar10_train.beton ] && [ -f "$train" ] && [ -f "$test" ]; then
    echo "What was converted before is there: $train and $test. --sources.path FOLDER converts anew."
elif own_recipe; then
    convert "$@" || exit
elif [ -n "${CIFAR10_DIR:-}" ]; then
    convert "$@" --sources.path "$CIFAR10_DIR" || exit
else
    status=0
    convert "$@" || status=$?
    if [ $status = 4 ] && [ -f data/cifar10_train.beton ] && [ -f data/cifar10_test.beton ]; then
        echo "What was converted before is there: data/cifar10_train.beton and data/cifar10_test.beton."
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
