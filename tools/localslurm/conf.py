"""The text of a local cluster's configuration files."""

from __future__ import annotations

import os
import pwd

from localslurm.settings import Cluster

# The timeouts are short, so that a lost node is noticed within seconds instead of minutes.
_SLURM_CONF = """\
ClusterName=local
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
DependencyParameters=kill_invalid_depend
MinJobAge=3600
KillWait=2
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=3
TCPTimeout=1
MessageTimeout=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
{gres}{nodes}
PartitionName=main Nodes=node[1-{num_nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=node[1-{num_nodes}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def slurm_conf(cluster: Cluster) -> str:
    """Return the text of slurm.conf, in which jobs of partition `urgent` preempt those of `main`."""
    return _SLURM_CONF.format(
        host=cluster.host,
        controller=cluster.controller_address,
        port=cluster.ports[0],
        user=pwd.getpwuid(os.geteuid()).pw_name,
        folder=cluster.folder,
        gres="GresTypes=gpu\n" if cluster.gpus else "",
        nodes="\n".join(_node(cluster, node) for node in cluster.nodes),
        num_nodes=cluster.num_nodes,
    )


def _node(cluster: Cluster, name: str) -> str:
    gpus = f" Gres=gpu:{cluster.gpus}" if cluster.gpus else ""
    # Without root, all nodes are this host and differ only in their ports.
    host = "" if cluster.as_root else f" NodeHostname={cluster.host}"
    return (
        f"NodeName={name}{host} NodeAddr={cluster.address(name)} Port={cluster.port(name)}"
        f" CPUs={cluster.cpus} Sockets=1 CoresPerSocket={cluster.cpus} ThreadsPerCore=1"
        f" RealMemory=4000{gpus} State=UNKNOWN"
    )


def gres_conf(cluster: Cluster) -> str:
    """Return the text of gres.conf, which declares the simulated GPUs, each with a device file."""
    return f"Name=gpu File={cluster.folder}/dev/gpu[0-{cluster.gpus - 1}]\n" if cluster.gpus else ""


def hosts(cluster: Cluster) -> str:
    """Return the text of /etc/hosts for every node.

    Each IPv4 address is also listed as an IPv6 address, because that is the form in which torch looks it up.
    """
    names = [(cluster.controller_address, cluster.host), *((cluster.address(n), n) for n in cluster.nodes)]
    lines = [f"{address} {name}\n::ffff:{address} {name}\n" for address, name in names]
    return "127.0.0.1 localhost\n" + "".join(lines)
