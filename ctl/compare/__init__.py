# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost compare`: the same workload over every way to give a guest a network that this machine has.

modes.py      what there is to compare, and what each mode puts between NIC and guest
plan.py       options and workloads: what is measured, how long, how often
world.py      namespaces and the veth pair (or two real interfaces); nothing is left of them
processes.py  child processes that end with their owner
native.py     the synthetic guest and its network (datapath/synthetic/guest.c, bpf/traffic.bpf.c)
memory.py     the guest's memory: rings and buffers
frontend.py   devices for the guest: by vhost-user; virtio_pci.py and e1000.py: in a QEMU without guest code;
              vhost_net.py: /dev/vhost-net
workloads.py  rates, round trips, idling
cost.py       what serving threads cost: CPU time, instructions, context switches
model.py      figures and results: JSON
run.py        the order of things
table.py, report.py, chart.py   for the terminal, and as a page
"""
