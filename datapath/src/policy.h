/* SPDX-License-Identifier: Apache-2.0 */
/* What a guest may do, as control said it: checked, and a copy of our own. Immutable, as the snapshot that has it. */
#ifndef XV_POLICY_H
#define XV_POLICY_H

#include "ipguard.h"

struct policy {
	uint32_t flags;  /* XV_POLICY_* */
	uint32_t access; /* VLAN of an access port, 0: it is none */
	bool is_trunk;
	uint64_t trunk[64]; /* a bit for each VLAN */
	uint32_t learn;
	struct xv_bucket_conf tx, rx, storm;
	struct ip_guard *guard; /* with XV_POLICY_IP_CHECK */
};

/* 0 or -errno: -EINVAL when it contradicts itself, or a VLAN, flag or IP version is none. */
int policy_new(const struct xv_policy_conf *conf, struct policy **out);
void policy_free(struct policy *policy);

/* Whether it says anything of the frames that come from the guest, but how many bytes of them. */
static inline bool policy_judges(const struct policy *policy)
{
	return policy->access || policy->is_trunk || policy->learn || policy->storm.rate ||
	       policy->flags & (XV_POLICY_SPOOF_CHECK | XV_POLICY_IP_CHECK | XV_POLICY_LINK_DOWN);
}

/* Whether frames of this VLAN (frame_vlan() of them) are for the guest. */
static inline bool policy_has_vlan(const struct policy *policy, uint16_t vlan)
{
	if (policy->access)
		return vlan == policy->access;
	return !policy->is_trunk || (vlan < 4096 && policy->trunk[vlan / 64] >> vlan % 64 & 1);
}

#endif
