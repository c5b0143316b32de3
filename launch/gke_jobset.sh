#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet: one pod per host, all restarted together when one of them ends early.
# usage: bash launch/gke_jobset.sh [--dry-run] COMMAND
#
#   submit FLAGS        python -m repae_jax.train --distributed FLAGS on every host; the same workdir continues a run. A JobSet of
#                       that NAME, even one that has ended, must be deleted first
#   manifest FLAGS      print the JobSet, to be changed by hand
#   logs [HOST|all]     follow the log of a host of the first slice (0 if none is named), or of all pods
#   status              show the JobSet and its pods
#   delete              end the run; it saves itself first
#
# Settings, from the environment:
#   NAME                name of the JobSet
#   IMAGE               container image made from the Dockerfile: this repository, installed, as the working folder
#   ACCELERATOR         label of the node pools: tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v5p-slice, …
#   TOPOLOGY            chips of a slice, e.g. 8x8
#   CHIPS_PER_HOST      4 if not set
#   SLICES              1 if not set; each is a node pool of its own, and training needs --config.mesh.slices=SLICES, too
#   BUCKET              mounted with Cloud Storage FUSE (the cluster's add-on GcsFuseCsiDriver), to be read at /mnt/BUCKET; none
#                       if not set
#   MAX_RESTARTS        20 if not set; every preemption and every killed process takes one. An error of the program (exit code 1 or
#                       2), which would recur, ends the JobSet
#   START_SECONDS       time in which all pods must start, counted from the first one; 1800 if not set
#   GRACE_SECONDS       time for saving after SIGTERM; 120 if not set. Spot nodes give 15 unless their pool is configured otherwise
#   NAMESPACE, SERVICE_ACCOUNT   'default' if not set; the latter needs the roles storage.objectUser and storage.legacyBucketReader
#                       on the bucket of the workdir. Pods of several slices are in the nodes' network, where the node's service
#                       account writes instead: it needs them, and scopes of the node pools that allow it (--scopes=storage-full)
#
# The cluster needs the JobSet controller (https://jobset.sigs.k8s.io). --dry-run prints the commands and runs none.
script=$0
# shellcheck source=launch/commands.sh
source "$(dirname "$0")/commands.sh"
options "$@"
command=${rest[0]:-}
options "${rest[@]:1}"

kube() { call kubectl --namespace="${NAMESPACE:-default}" "$@"; }

# Prints a text as a JSON string, which is valid YAML.
quoted() {
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# Prints one line per word; $ is doubled because Kubernetes replaces $(NAME) in commands.
words() {
    local word
    for word in "$@"; do printf '                - %s\n' "$(quoted "${word//\$/\$\$}")"; done
}

manifest() {
    need IMAGE=us-docker.pkg.dev/my-project/repae/train:1 ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=8x8
    [ $# -gt 0 ] || fail "$command needs flags of training: $command --config configs/repae.py --workdir gs://bucket/run"
    local setting chips per_host=${CHIPS_PER_HOST:-4} slices=${SLICES:-1} restarts=${MAX_RESTARTS:-20} grace=${GRACE_SECONDS:-120}
    local start=${START_SECONDS:-1800} hosts longest
    [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY: expected chips per side, e.g. 8x8 or 4x4x8"
    for setting in "CHIPS_PER_HOST=$per_host" "SLICES=$slices" "MAX_RESTARTS=$restarts" "GRACE_SECONDS=$grace" \
        "START_SECONDS=$start"; do
        [[ $setting =~ =[0-9]+$ ]] || fail "$setting: expected a whole number"
    done
    chips=$((${TOPOLOGY//x/*}))
    ((per_host > 0 && chips % per_host == 0)) || fail "TOPOLOGY=$TOPOLOGY has $chips chips, which CHIPS_PER_HOST=$per_host does not divide"
    hosts=$((chips / per_host)) longest=$NAME-slice-$((slices - 1))-$((chips / per_host - 1))-abcde # name of a pod
    ((${#longest} <= 63)) || fail "NAME=$NAME is too long by $((${#longest} - 63)) letters: pods are named $longest, with 63 at most"
    # Workers pass batches through shared memory, of which a pod has 64 MB by default.
    local annotations='{}' volumes='{name: shared, emptyDir: {medium: Memory}}' mounts='{name: shared, mountPath: /dev/shm}'
    # The host network is much faster between slices; its pods have the node's service account, not SERVICE_ACCOUNT.
    local host_network=false dns=ClusterFirst
    if ((slices > 1)); then host_network=true dns=ClusterFirstWithHostNet; fi
    if [ -n "${BUCKET:-}" ]; then
        local attributes
        attributes="bucketName: $(quoted "$BUCKET"), mountOptions: implicit-dirs"
        ! $host_network || attributes+=', hostNetworkPodKSA: "true"'
        annotations='{gke-gcsfuse/volumes: "true"}'
        volumes+=", {name: bucket, csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, volumeAttributes: {$attributes}}}"
        mounts+=", {name: bucket, mountPath: $(quoted "/mnt/$BUCKET"), readOnly: true}"
    fi
    cat <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a slice is a node pool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: error
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0  # one failed pod restarts them all
          podFailurePolicy:
            rules:
              - action: FailJob  # an error of the program would recur
                onExitCodes: {containerName: train, operator: In, values: [1, 2]}
          template:
            metadata:
              annotations: $annotations
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace
              serviceAccountName: $(quoted "${SERVICE_ACCOUNT:-default}")
              hostNetwork: $host_network
              dnsPolicy: $dns
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$ACCELERATOR")
                cloud.google.com/gke-tpu-topology: $(quoted "$TOPOLOGY")
              volumes: [$volumes]
              containers:
              - name: train
                image: $(quoted "$IMAGE")
                ports:
                - containerPort: 8471  # between the TPUs of a slice
                - containerPort: 8080  # between slices
                - containerPort: 8476  # jax.distributed's coordinator
                env:
                - {name: JAX_COORDINATOR_PORT, value: "8476"}  # JAX's default, 8482, is closed by the firewalls of TPUs
                - {name: START_SECONDS, value: "$start"}
                volumeMounts: [$mounts]
                resources:
                  limits:
                    google.com/tpu: $per_host
                command:
$(words python -m repae_jax.train --distributed "$@")
MANIFEST
}

submit() {
    local text
    text=$(manifest "$@")
    if [ -n "$dry_run" ]; then
        printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(kube create --filename=-)" "$text"
    else
        kube create --filename=- <<<"$text"
    fi
}

logs() {
    local pods=jobset.sigs.k8s.io/jobset-name=$NAME
    case ${1:-0} in
    all) kube logs --prefix --tail=5 --max-log-requests=1000 --selector="$pods" ;;
    *[!0-9]*) fail "logs takes the number of a host or 'all', not '$1'" ;;
    *) kube logs --follow --tail=100 --selector="$pods,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=${1:-0}" ;;
    esac
}

status() {
    kube get jobset "$NAME"
    kube get pods --output=wide --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
}

delete() { kube delete jobset "$NAME"; }

case $command in
submit | manifest | logs | status | delete) ;;
*) fail "'$command' is none of the commands submit, manifest, logs, status or delete; see --help" ;;
esac
need NAME=repae
[[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "NAME=$NAME: expected small letters, digits and hyphens, a letter first"
"$command" "${rest[@]}"
