# Functions shared by the scripts in this folder: site settings, starting ranks, signals and requeueing.
#
# A script sources this file and calls one of
#   everest_ranks COMMAND ARGS...   run a command on all ranks (pretrain, finetune, evaluate), with requeueing
#   everest_once COMMAND ARGS...    run a command as one process on the first node (profile, report)
#
# Read from the environment (all optional):
#   EVEREST_CLUSTER       name of a file in clusters/, or the path of one (default: generic)
#   EVEREST_PYTHON        the Python in which everest-ds is installed (default: python3)
#   EVEREST_MAX_RESTARTS  how often a job may be requeued (default: 50)
#   EVEREST_SIGNAL_SECONDS  SECONDS of --signal=USR1@SECONDS, if they differ from the scripts' 300
#   EVEREST_EXCLUDE_BAD_NODES  1: exclude a node that fails the preflight when the job is requeued
#
# Arguments are passed on unchanged, never through another shell. Python code (`everest-ds job`), which has
# its own tests, decides what to do after each exit code.

EVEREST_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
EVEREST_SRUN=()       # more options for srun, such as --mpi=none
EVEREST_CONTAINER=()  # options with which srun enters a container (pyxis)
EVEREST_WRAP=()       # a command in front of Python, such as: apptainer exec --nv image.sif
everest_modules() { :; }

everest_note_signal() {
    everest_signalled=1
    everest_interrupted=1
    [[ -z ${everest_srun:-} ]] || kill -USR1 "$everest_srun" 2>/dev/null  # srun passes it on to every rank
}
everest_signalled=
trap everest_note_signal USR1 TERM INT  # from here on, because loading modules can take seconds

everest_say() { printf 'everest-ds: %s\n' "$*" >&2; }

everest_cluster_file() {
    local name=${EVEREST_CLUSTER:-generic}
    [[ $name == */* ]] || name=$EVEREST_SLURM/clusters/$name.env
    [[ -r $name ]] || { everest_say "no cluster file $name; fix: EVEREST_CLUSTER=NAME of $EVEREST_SLURM/clusters/, or a path"; exit 2; }
    printf '%s' "$name"
}

EVEREST_CLUSTER_FILE=$(everest_cluster_file) || exit 2
set -a
# shellcheck source=/dev/null
source "$EVEREST_CLUSTER_FILE"
set +a
everest_modules || { everest_say "everest_modules of $EVEREST_CLUSTER_FILE failed"; exit 2; }
EVEREST_PYTHON=${EVEREST_PYTHON:-python3}
# SLURM_JOB_ID of an array task can equal the id of the whole array, so the task number is appended.
everest_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
everest_job=${everest_job:-$SLURM_JOB_ID}
export EVEREST_SIGNAL_SECONDS=${EVEREST_SIGNAL_SECONDS:-300}
export PYTHONUNBUFFERED=1  # users read the job's output while it runs
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun ignores SLURM_CPUS_PER_TASK

# Run a command as one process on this node, inside the container if there is one.
everest_once() {
    local step=()
    (( ${#EVEREST_CONTAINER[@]} == 0 )) || step=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${EVEREST_CONTAINER[@]}")
    "${step[@]}" "${EVEREST_WRAP[@]}" "$EVEREST_PYTHON" -m everest_ds "$@"
}

# Run a command as everest_once does, although signals ask the job to stop: its answer is needed in any case.
everest_undisturbed() {
    local attempt code
    for attempt in 1 2 3; do
        (trap '' INT TERM USR1; everest_once "$@")
        code=$?
        (( code > 128 )) || break  # ended by a signal, which SLURM sends to the command itself in a container
    done
    return "$code"
}

# Set srun's options for the number of ranks: as given to sbatch (--ntasks...), or one rank per GPU, or one per node.
everest_sizes() {
    local per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE > per_node ? SLURM_CPUS_ON_NODE / per_node : 1))}}
    everest_size_options=()
    [[ -z ${SLURM_NTASKS:-} ]] || return 0
    everest_size_options=(--ntasks-per-node="$per_node")
    if (( per_node > SLURM_CPUS_ON_NODE )); then
        everest_say "$per_node ranks share $SLURM_CPUS_ON_NODE CPUs of a node; fix: sbatch --ntasks-per-node=$per_node --cpus-per-task=N"
        everest_size_options+=(--overcommit)
    fi
}

# Run srun and store its exit code in everest_code. Signals to this shell reach all ranks.
everest_run_step() {
    local code
    # --wait: seconds that the other ranks have to log their reasons after the first rank has ended.
    srun --kill-on-bad-exit=0 --wait=60 "${everest_size_options[@]}" "${EVEREST_SRUN[@]}" "${EVEREST_CONTAINER[@]}" \
        "${EVEREST_WRAP[@]}" "$EVEREST_PYTHON" -m everest_ds "$@" &
    everest_srun=$!
    [[ -z $everest_signalled ]] || kill -USR1 "$everest_srun" 2>/dev/null  # the signal came while srun started
    everest_code=1
    while :; do
        everest_interrupted=
        wait "$everest_srun"
        code=$?
        (( code == 127 )) || everest_code=$code  # 127: the exit code was collected just before the trap ran
        [[ -n $everest_interrupted ]] || break
    done
    everest_srun=
}

# Requeue this job, excluding the given nodes; returns only if requeueing fails.
everest_requeue() {
    local bad=$1 attempt
    # SLURM sends this shell TERM now, but a job's nodes can be excluded only once it is pending.
    for attempt in 1 2 3 4 5 6; do  # the controller may be restarting
        if scontrol requeue "$everest_job"; then
            [[ -n $bad && ${EVEREST_EXCLUDE_BAD_NODES:-0} == 1 ]] && everest_exclude "$bad"
            exit 75
        fi
        sleep 5
    done
    everest_say "could not requeue job $everest_job; the same sbatch line resumes from the last checkpoint"
}

everest_exclude() {
    local attempt
    for attempt in {1..50}; do
        scontrol update "JobId=$everest_job" "ExcNodeList=$1" 2>/dev/null && return
        sleep 0.1
    done
    everest_say "could not exclude $1"
}

everest_ranks() {
    local state verdict bad
    everest_undisturbed job begin "$@" || exit
    everest_sizes
    everest_code=75
    [[ -n $everest_signalled ]] || everest_run_step "$@"
    trap '' INT TERM USR1  # a command substitution would be ended by a signal that this shell only notes
    state=$(squeue --noheader --jobs="$everest_job" --format='%T/%r' 2>/dev/null || true)
    verdict=$(everest_undisturbed job end "$everest_code" "${state:-RUNNING/None}" "$@") || exit "$everest_code"
    read -r verdict bad <<<"${verdict##*$'\n'}"  # only the last line: a container may print a greeting
    [[ $verdict == requeue ]] && everest_requeue "$bad"
    exit "$everest_code"
}
