# How long OpenMP's threads look out before they sleep: digits for 4 epochs alone, and twice at once. 300000 is what GNU's OpenMP does when
# nobody says how; 5000 is what our programs say. From the repository's root, after write_datasets.py with digits.yaml: sh waiting.sh OUT
train() {
    env "$1" python ffcv_train.py --config-file rn_configs/digits.yaml --loop.epochs 4 --run.seed "$2" --run.folder "$out/$3-$2-$round-$1" |
        tail -n 1 | sed "s/^/$3, $1: /"
}
out=$1
for round in 1 2 3; do
    for how in GOMP_SPINCOUNT=300000 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 GOMP_SPINCOUNT=5000; do train "$how" 1 alone; done
done
for round in 1 2; do
    for how in GOMP_SPINCOUNT=300000 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 GOMP_SPINCOUNT=5000; do
        train "$how" 1 two & train "$how" 2 two & wait
    done
done
