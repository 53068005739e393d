// SPDX-License-Identifier: Apache-2.0
#include "policy.h"

#include <errno.h>
#include <stdlib.h>

#define FLAGS (XV_POLICY_SPOOF_CHECK | XV_POLICY_ISOLATED | XV_POLICY_IP_CHECK | XV_POLICY_LINK_DOWN)

static bool is_valid(const struct xv_policy_conf *conf, const uint64_t *trunk, const struct xv_ip *addresses)
{
	if (conf->flags & ~FLAGS || conf->access > 4094 || (conf->access && trunk) || conf->learn > XV_MAX_LEARNED)
		return false;
	if (conf->nr_addresses > XV_MAX_ADDRESSES)
		return false;
	if (trunk && (trunk[0] & 1 || trunk[63] >> 63)) /* 0 is no VLAN, and 4095 may not be used (IEEE 802.1Q, 9.6) */
		return false;
	for (uint32_t i = 0; i < conf->nr_addresses; i++)
		if (addresses[i].version != 4 && addresses[i].version != 6)
			return false;
	return true;
}

int policy_new(const struct xv_policy_conf *conf, struct policy **out)
{
	const uint64_t *trunk = (const uint64_t *)(uintptr_t)conf->trunk;
	const struct xv_ip *addresses = (const struct xv_ip *)(uintptr_t)conf->addresses;
	struct policy *policy;
	int result;

	if (!is_valid(conf, trunk, addresses))
		return -EINVAL;
	policy = calloc(1, sizeof(*policy));
	if (!policy)
		return -ENOMEM;
	policy->flags = conf->flags;
	policy->access = conf->access;
	policy->is_trunk = trunk;
	if (trunk)
		memcpy(policy->trunk, trunk, sizeof(policy->trunk));
	policy->learn = conf->learn;
	policy->tx = conf->tx;
	policy->rx = conf->rx;
	policy->storm = conf->storm;
	if (conf->flags & XV_POLICY_IP_CHECK) {
		result = ip_guard_new(addresses, conf->nr_addresses, &policy->guard);
		if (result) {
			free(policy);
			return result;
		}
	}
	*out = policy;
	return 0;
}

void policy_free(struct policy *policy)
{
	if (policy)
		free(policy->guard);
	free(policy);
}
