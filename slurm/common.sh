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

everest_say() { printf 'everest-ds: %s\n' "$*" >&2; }

everest_note_signal() {
    everest_signalled=1
    everest_interrupted=1
    [[ -z ${everest_srun:-} ]] || kill -USR1 "$everest_srun" 2>/dev/null  # srun passes it on to every rank
}

# Set everest_limit and everest_end, the time limit in seconds and its date in seconds since 1970; 0 if there is no limit.
everest_read_times() {
    local start
    read -r start everest_end < <(SLURM_TIME_FORMAT=%s squeue --noheader --states=all --jobs="${everest_job:-$SLURM_JOB_ID}" --format='%S %e')
    [[ $start$everest_end =~ ^[0-9]+$ ]] || everest_end=0 start=0
    everest_limit=$((everest_end - start))
}

# Handle SLURM's warning before the time limit. In a short job it comes at the start, and is kept for the right time.
everest_note_warning() {
    local delay
    everest_interrupted=1
    everest_read_times
    delay=$((everest_end - everest_limit / 4 - $(date +%s)))
    if [[ -z ${everest_timer:-} ]] && (( everest_limit < 2 * EVEREST_SIGNAL_SECONDS && delay > 0 )); then
        everest_say "the time limit is short: the ranks are stopped $((everest_limit / 4)) s before it"
        (sleep "$delay"; kill -USR1 "$$") &
        everest_timer=$!
    else
        everest_note_signal
    fi
}

: "${EVEREST_SIGNAL_SECONDS:=300}"
[[ $EVEREST_SIGNAL_SECONDS != *[!0-9]* ]] ||
    { everest_say "EVEREST_SIGNAL_SECONDS is not a whole number; given: '$EVEREST_SIGNAL_SECONDS'"; exit 2; }
everest_signalled=
trap everest_note_signal TERM INT  # from here on, because loading modules can take seconds
trap everest_note_warning USR1

everest_cluster_file() {
    local name=${EVEREST_CLUSTER:-generic}
    [[ $name == */* ]] || name=$EVEREST_SLURM/clusters/$name.env
    [[ -r $name ]] || { everest_say "no cluster file $name; fix: EVEREST_CLUSTER=NAME of $EVEREST_SLURM/clusters/, or a path"; exit 2; }
    printf '%s' "$name"
}

# Set the variables of this job from SLURM's record of it. sbatch passes on the environment of its caller; if that is
# another job, its SLURM_* variables describe the other job (its tasks, its array, its restarts, its step).
everest_read_job() {
    local id array task restarts tasks nodes per_node cpus gpus name
    while IFS='|' read -r id array task restarts tasks nodes per_node cpus gpus; do
        [[ $id != "$SLURM_JOB_ID" ]] || break  # the last task of an array has the id of the whole array
    done < <(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --Format="JobID:|,ArrayJobID:|,ArrayTaskID:|,RestartCnt:|,\
NumTasks:|,NumNodes:|,NTPerNode:|,cpus-per-task:|,tres-per-node:")
    [[ $id == "$SLURM_JOB_ID" ]] || { everest_say "squeue does not list job $SLURM_JOB_ID"; exit 1; }
    everest_job=$id
    [[ $task == *[!0-9]* ]] || everest_job=${array}_$task
    [[ $per_node =~ ^[1-9][0-9]*$ ]] || per_node=
    # SLURM's record is the same without --ntasks, so a SLURM_NTASKS of one task per node may be the caller's.
    everest_unclear=
    [[ -n $per_node || $tasks != "$nodes" ]] || everest_unclear=${SLURM_NTASKS:-}
    # The process that called sbatch may have been a rank.
    [[ -z ${RANK:-} ]] || unset MASTER_ADDR MASTER_PORT
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS \
        "${!OMPI_COMM_WORLD_@}" SRUN_CPUS_PER_TASK
    [[ -n ${SLURM_STEP_ID:-} || ${SLURM_ARRAY_TASK_ID:-N/A} != "$task" || ${SLURM_RESTART_COUNT:-0} != "$restarts" ||
        ${SLURM_NTASKS:-$tasks} != "$tasks" || ${SLURM_NTASKS_PER_NODE:-$per_node} != "$per_node" ||
        ${SLURM_CPUS_PER_TASK:-$cpus} != "$cpus" || $gpus != *"${SLURM_GPUS_PER_NODE:-}" ]] || return 0
    for name in "${!SLURM_@}"; do
        case $name in  # SLURM sets these for every batch script, or they describe the cluster
            SLURM_JOB_*|SLURM_JOBID|SLURM_NNODES|SLURM_NODE*|SLURM_*_ON_NODE|SLURM_TASKS_PER_NODE|SLURM_TASK_PID|SLURM_PROCID|\
            SLURM_LOCALID|SLURM_GTIDS|SLURM_SUBMIT_*|SLURM_CLUSTER*|SLURM_CONF|SLURM_WORKING_CLUSTER|SLURM_TOPOLOGY_*|\
            SLURM_EXPORT_ENV|SLURM_GET_USER_ENV) ;;
            *) unset "$name" ;;
        esac
    done
    export SLURM_RESTART_COUNT=$restarts
    [[ $everest_job == "$id" ]] || export SLURM_ARRAY_JOB_ID=$array SLURM_ARRAY_TASK_ID=$task
    [[ -z $per_node ]] || export SLURM_NTASKS_PER_NODE=$per_node
    [[ -z $per_node && $tasks == "$nodes" ]] || export SLURM_NTASKS=$tasks
    [[ ! $cpus =~ ^[1-9][0-9]*$ ]] || (( cpus == 1 )) || export SLURM_CPUS_PER_TASK=$cpus
}

everest_read_job
everest_read_times
# If the warning would come before half of the time limit, it is passed on after three quarters.
export EVEREST_LIMIT_SECONDS=$everest_limit
export EVEREST_LEAD_SECONDS=$EVEREST_SIGNAL_SECONDS
(( everest_limit == 0 || everest_limit >= 2 * EVEREST_SIGNAL_SECONDS )) || EVEREST_LEAD_SECONDS=$((everest_limit / 4))
[[ -z ${everest_early:-} ]] || everest_note_warning

EVEREST_CLUSTER_FILE=$(everest_cluster_file) || exit 2
set -a
# shellcheck source=/dev/null
source "$EVEREST_CLUSTER_FILE"
set +a
everest_modules || { everest_say "everest_modules of $EVEREST_CLUSTER_FILE failed"; exit 2; }
EVEREST_PYTHON=${EVEREST_PYTHON:-python3}
export PYTHONUNBUFFERED=1  # users read the job's output while it runs
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun ignores SLURM_CPUS_PER_TASK

# Run a command as one process on this node, inside the container if there is one.
everest_once() {
    local python=("${EVEREST_WRAP[@]}" "$EVEREST_PYTHON") code
    (( ${#EVEREST_CONTAINER[@]} == 0 )) ||
        python=(srun --export=ALL --nodes=1 --ntasks=1 --ntasks-per-node=1 "${EVEREST_CONTAINER[@]}" "${python[@]}")
    "${python[@]}" -m everest_ds "$@" && return
    code=$?
    if (( code == 1 || code == 126 || code == 127 )) && ! "${python[@]}" -c 'import everest_ds' 2>/dev/null; then
        everest_say "$EVEREST_PYTHON has no everest-ds${SLURM_EXPORT_ENV:+ (the job was submitted with --export=$SLURM_EXPORT_ENV)};" \
            "fix: sbatch --export=ALL,EVEREST_PYTHON=/path/to/python, or set EVEREST_PYTHON in a cluster file"
    fi
    return "$code"
}

# Store the words that an `everest-ds job` command answers in everest_answer. Modules, containers and Pythons print
# greetings on stdout, so only the line that our program marks counts.
everest_ask() {
    local output
    output=$(trap '' INT TERM USR1; everest_undisturbed job "$@") || return
    mapfile -d '' -t everest_answer < <(sed -n 's/^everest-ds answers: //p' <<<"$output" | tail -n 1 | base64 --decode)
    (( ${#everest_answer[@]} > 0 )) || { everest_say "no answer from everest-ds job $1"; return 1; }
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
    srun --export=ALL --kill-on-bad-exit=0 --wait=60 "${everest_size_options[@]}" "${EVEREST_SRUN[@]}" "${EVEREST_CONTAINER[@]}" \
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
    local state
    if (( ${SLURM_GPUS_ON_NODE:-1} > 1 )) && [[ $everest_unclear == "$SLURM_NNODES" ]]; then
        everest_say "--ntasks or a job that called sbatch asks for one rank on each node, which has $SLURM_GPUS_ON_NODE GPUs;" \
            "fix: sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE, or --ntasks-per-node=1 if one rank is meant"
        exit 2
    fi
    everest_undisturbed job begin "$@" || exit
    everest_sizes
    everest_code=75
    [[ -n $everest_signalled ]] || everest_run_step "$@"
    trap '' INT TERM USR1  # a command substitution would be ended by a signal that this shell only notes
    state=$(squeue --noheader --jobs="$everest_job" --format='%T/%r' 2>/dev/null || true)
    everest_ask end "$everest_code" "${state:-RUNNING/None}" "$@" || exit "$everest_code"
    [[ ${everest_answer[0]} != requeue ]] || everest_requeue "${everest_answer[1]}"
    exit "$everest_code"
}
